# SPDX-License-Identifier: MIT
"""Writing files so that a run killed at any moment, or a full disk, leaves the old file or the new one.

`check_target` and its siblings refuse a target before the work; `atomic_file` and `atomic_folder` write it;
`cmfast.files.locks` keeps two processes from writing one thing. A temporary file is locked as long as its writer lives,
so that the next write in its folder can tell what a killed process left behind, and removes it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import platform
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from cmfast.errors import CmfastError
from cmfast.files.locks import lock_shared_with_children

StrPath = str | os.PathLike[str]

# A lock tells nothing of another machine's processes, so their temporaries, on a shared disk, are left alone.
_HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
_OWN_TEMPORARY = re.compile(rf"\..*\.{_HOST}-[0-9a-f]{{8}}\.cmfast-tmp(\.[^.]*)?", re.DOTALL)
_YOUNG_S = 10.0  # an empty temporary that was made so recently may just be about to be locked
_LONGEST = 180  # bytes of a target's name in that of its temporary; file systems end at 255
_NO_SPACE = {
    errno.ENOSPC: "no space left in {folder}",
    errno.EDQUOT: "the disk quota is used up in {folder}",
    errno.EFBIG: "the file would be larger than this process may write (ulimit -f) in {folder}",
}
_PROBE = 1 << 20  # bytes
_KERNEL = ("/proc", "/sys", "/dev")  # no place for files, whatever the permissions say


@contextmanager
def atomic_file(path: StrPath) -> Iterator[Path]:
    """Give a temporary path beside `path`; when the block ends well, flush it to disk and rename it to `path`.

    A link to a file stays, and the file behind it is replaced.

    Raises:
        CmfastError: `path` cannot be a file (`check_target`), or there is no space for it; the old file stays.
    """
    target = check_target(path)
    real = _behind_links(target)
    remove_leftovers(real.parent)
    with _no_space_in_one_line(target), _new_temporary(real, folder=False) as temporary:
        try:
            yield temporary
            _flush(temporary)
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, real)
            _flush(real.parent)
        except Exception as err:
            said = _for_user(err, target, temporary)
            if said is err:
                raise
            raise said from None
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: StrPath, within: StrPath | None = None) -> Iterator[Path]:
    """Give a temporary folder beside `path`; when the block ends well, rename it to `path`, new or empty until then.

    Args:
        within: another place for the temporary folder, on the file system of `path`: where another program watches the
            folder around `path`.

    Raises:
        CmfastError: `path` cannot be a new folder (`check_target_folder`), or there is no space for it.
    """
    target = check_target_folder(path)
    real = _behind_links(target)
    folder = real.parent if within is None else Path(within)
    remove_leftovers(folder)
    with _no_space_in_one_line(target), _new_temporary(folder / real.name, folder=True) as temporary:
        try:
            yield temporary
            mask = _umask()
            for entry in sorted(temporary.rglob("*"), reverse=True):  # what is in a folder before the folder
                os.chmod(entry, (0o777 if entry.is_dir() else 0o666) & ~mask)  # some libraries write private files
                _flush(entry)
            os.chmod(temporary, 0o777 & ~mask)
            _flush(temporary)
            os.replace(temporary, real)  # over an empty folder this is allowed
            _flush(real.parent)
        except Exception as err:
            said = _for_user(err, target, temporary)
            if said is err:
                raise
            raise said from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def temporary_folder(beside: StrPath) -> Iterator[Path]:
    """Give an empty folder next to `beside`, on its file system, removed at the end of the block.

    If the process is killed, the next write in that place removes it.
    """
    target = Path(os.path.abspath(beside))
    remove_leftovers(target.parent)
    with _no_space_in_one_line(target), _new_temporary(target, folder=True) as temporary:
        try:
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def check_target(path: StrPath, suffixes: Sequence[str] = (), inputs: Iterable[StrPath] = ()) -> Path:
    """Return `path` as a Path if a file can be written there, else raise CmfastError: before the work, not after it.

    Args:
        suffixes: those that are allowed, in lower case; (): any
        inputs: what the same command reads; none of it is replaced

    Raises:
        CmfastError: no file can be written there, or it has another suffix.
    """
    target = Path(path)
    if suffixes and target.suffix.lower() not in suffixes:
        raise CmfastError(f"{target}: the name must end in {' or '.join(suffixes)}")
    _need_folder(target.parent)
    if target.is_dir():
        raise CmfastError(f"{target} is a folder; name a file")
    if target.exists() and not stat.S_ISREG(target.stat().st_mode):
        raise CmfastError(f"{target} is {_kind(target.stat().st_mode)}, not a regular file; name a file")
    _refuse_inputs(target, inputs)
    _need_folder(_behind_links(target).parent)
    _refuse_kernel(target.parent, target)
    _need_writable(_behind_links(target).parent, target)
    return target


def check_target_folder(path: StrPath, inputs: Iterable[StrPath] = ()) -> Path:
    """Return `path` as a Path if a new folder can stand there, else raise CmfastError; `inputs`: see `check_target`."""
    target = Path(path)
    real = _behind_links(target)
    _need_folder(real.parent)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CmfastError(f"{target} exists and is not an empty folder; name another or remove it")
    if real == Path.cwd() or target.name in ("", ".."):
        raise CmfastError(f"{target} is a folder in use, which cannot be replaced; name a new folder in it")
    if target.exists() and os.path.ismount(target):
        raise CmfastError(
            f"{target} is a mount point, which cannot be replaced; name a new folder in it: {target / 'NAME'}"
        )
    _refuse_inputs(target, inputs)
    _need_writable(real.parent, target)
    return target


def check_outputs(outputs: Mapping[str, StrPath | None], inputs: Iterable[StrPath] = ()) -> None:
    """Raise CmfastError unless all files of a command can be written: {option: path or None}, no two the same.

    Args:
        inputs: what the command reads; none of it is replaced

    Raises:
        CmfastError: a file cannot be written, or two options name the same one.
    """
    read, seen = list(inputs), dict[Path, str]()
    for option, path in outputs.items():
        if path is None:
            continue
        try:
            real = _behind_links(check_target(path, inputs=read))
        except CmfastError as err:
            raise CmfastError(f"{option}: {err}") from None
        if real in seen:
            raise CmfastError(f"{seen[real]} and {option} name the same file, {path}; name two")
        seen[real] = option


def write_text(path: StrPath, text: str) -> None:
    """Write a small text file atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def remove_leftovers(folder: StrPath) -> None:
    """Delete what killed processes left in this folder: temporary our files and folders that are not locked."""
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(folder)):
            if _OWN_TEMPORARY.fullmatch(entry.name) and not entry.is_symlink():
                _remove_if_left(Path(entry.path))


def _remove_if_left(path: Path) -> None:
    with contextlib.suppress(OSError):  # gone meanwhile, or another user's
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
        try:
            found = os.fstat(descriptor)
            is_folder = stat.S_ISDIR(found.st_mode)
            empty = not os.listdir(path) if is_folder else found.st_size == 0  # what has content was locked before
            if (empty and time.time() - found.st_mtime < _YOUNG_S) or not lock_shared_with_children(descriptor):
                return
            if is_folder:
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        finally:
            os.close(descriptor)


@contextmanager
def _new_temporary(target: Path, *, folder: bool) -> Iterator[Path]:
    """Give a new, empty, private file or folder beside `target`, locked until the block ends."""
    name = os.fsdecode(os.fsencode(target.name)[:_LONGEST])
    suffix = "" if folder or len(target.suffix) > 20 else target.suffix
    while True:
        path = target.with_name(f".{name}.{_HOST}-{secrets.token_hex(4)}.cmfast-tmp{suffix}")
        try:
            if folder:
                path.mkdir(mode=0o700)
            else:
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
            break
        except FileExistsError:
            continue
    if os.name == "nt":  # what is open cannot be renamed there, and folders cannot be opened
        yield path
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        lock_shared_with_children(descriptor)
        yield path
    finally:
        os.close(descriptor)


@contextmanager
def _no_space_in_one_line(target: Path) -> Iterator[None]:
    """Turn a disk that is full already when the temporary file is made into one line."""
    try:
        yield
    except OSError as err:
        if err.errno not in _NO_SPACE:
            raise
        raise _no_space(err.errno, target) from None


def _for_user(err: Exception, target: Path, temporary: Path) -> Exception:
    """Return what to raise for an error while writing: one line if the disk is its reason, else the error itself.

    Libraries hide it: torch.save raises RuntimeError, safetensors an error of its own. So the disk is checked again.
    """
    if isinstance(err, CmfastError):
        return err
    if isinstance(err, OSError):
        if err.errno in _NO_SPACE:
            return _no_space(err.errno, target)
        if err.filename is not None and os.fspath(err.filename).startswith(os.fspath(temporary)):
            return CmfastError(f"cannot write {target}: {err.strerror}")
        return err
    try:
        _write_more(temporary)
    except OSError as full:
        if full.errno in _NO_SPACE:
            return _no_space(full.errno, target)
    return err


def _write_more(temporary: Path) -> None:
    """Append to the file, or to the largest file of the folder, so that a full disk shows itself.

    Only to what stands there alone: a link, symbolic or hard, is also a file elsewhere.
    """
    if temporary.is_dir():
        files = [entry for entry in temporary.rglob("*") if _stands_alone(entry)]
        temporary = max(files, key=lambda file: file.stat().st_size, default=temporary / "probe")
    elif not _stands_alone(temporary):
        return
    with temporary.open("ab") as file:
        file.write(bytes(_PROBE))
        file.flush()
        os.fsync(file.fileno())


def _stands_alone(path: Path) -> bool:
    found = path.lstat()
    return stat.S_ISREG(found.st_mode) and found.st_nlink == 1


def _no_space(number: int, target: Path) -> CmfastError:
    why = _NO_SPACE[number].format(folder=target.parent)
    stays = "the file that was there stays" if target.is_file() else "nothing was written"
    return CmfastError(f"cannot write {target}: {why}; {stays}")


def _refuse_inputs(target: Path, inputs: Iterable[StrPath]) -> None:
    for each in inputs:
        if _behind_links(target) == _behind_links(Path(each)) or (
            target.exists() and os.path.exists(each) and os.path.samefile(target, each)
        ):
            raise CmfastError(f"{target} is read by this command, so it is not overwritten; name another file")


def _need_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise CmfastError(f"the folder {folder} does not exist; make it first: mkdir -p {folder}")


def _need_writable(folder: Path, target: Path) -> None:
    _refuse_kernel(folder, target)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise CmfastError(f"cannot write {target}: no permission to write in {folder}")


def _refuse_kernel(folder: Path, target: Path) -> None:
    real = os.path.realpath(folder)
    inside = any(real == place or real.startswith(f"{place}/") for place in _KERNEL)
    if os.name == "posix" and inside and not real.startswith("/dev/shm"):
        raise CmfastError(f"{target}: {real} is not a place for files; name another folder")


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFIFO: "a FIFO", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket",
    }  # fmt: skip
    return kinds.get(stat.S_IFMT(mode), "special")


def _behind_links(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _flush(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open a folder
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    """Return the umask. Setting it to read it would open the files that other threads make meanwhile."""
    with contextlib.suppress(OSError):
        if found := re.search(r"^Umask:\s*([0-7]+)$", Path("/proc/self/status").read_text(), re.MULTILINE):
            return int(found[1], 8)
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
