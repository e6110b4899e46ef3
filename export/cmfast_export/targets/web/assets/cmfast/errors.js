// SPDX-License-Identifier: MIT
// CmfastError: what a user or the author of a page can fix, in one line.

export class CmfastError extends Error {
  name = "CmfastError";
}

/** Return a value as it appears in an error: one line, not long. */
export function shown(value) {
  const text = value === undefined ? "nothing" : typeof value === "bigint" ? String(value) : JSON.stringify(value);
  return text.length <= 80 ? text : `${text.slice(0, 80)}..`;
}
