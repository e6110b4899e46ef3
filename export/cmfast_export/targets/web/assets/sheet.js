// SPDX-License-Identifier: MIT
// What the canvas shows: a grid of images, pixel by pixel, or of line plots of samples that are no images.

const PLOT = [240, 160]; // width and height of a plot
const LINES = ["#3b6fe0", "#e0702f", "#2a9d6a", "#b04fc4", "#c9a227", "#d1495b", "#3aa6b9", "#7a7f8c"];

export class Sheet {
  #canvas;
  #context;
  #manifest;
  #columns = 1;
  #gap; // pixels between two samples

  constructor(canvas, manifest) {
    this.#canvas = canvas;
    this.#context = canvas.getContext("2d");
    this.#manifest = manifest;
    this.#gap = Math.max(1, Math.round(Math.min(...this.#cell()) / 16));
    canvas.classList.toggle("plots", manifest.data !== "image");
  }

  /** Make room for so many samples; those that were there stay until new ones come. */
  begin(count) {
    this.#columns = Math.ceil(Math.sqrt(count));
    const [wide, high] = this.#cell();
    const rows = Math.ceil(count / this.#columns);
    const [width, height] = [this.#columns * (wide + this.#gap) - this.#gap, rows * (high + this.#gap) - this.#gap];
    if (this.#canvas.width !== width || this.#canvas.height !== height) {
      this.#canvas.width = width;
      this.#canvas.height = height;
    }
  }

  /** Show a sample: bytes [H, W, C] of an image, else numbers. */
  put(index, values) {
    const [wide, high] = this.#cell();
    const left = (index % this.#columns) * (wide + this.#gap);
    const top = Math.floor(index / this.#columns) * (high + this.#gap);
    if (this.#manifest.data === "image") this.#context.putImageData(this.#image(values), left, top);
    else this.#plot(values, left, top);
  }

  /** Offer what is shown as a file. */
  save(name) {
    this.#canvas.toBlob((blob) => {
      const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: name });
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
    });
  }

  #cell() {
    const { data, shape } = this.#manifest;
    return data === "image" ? [shape[2], shape[1]] : PLOT;
  }

  #image(bytes) {
    const [channels, height, width] = this.#manifest.shape;
    const image = new ImageData(width, height);
    for (let i = 0; i < width * height; i++) {
      for (let k = 0; k < 3; k++) image.data[4 * i + k] = bytes[i * channels + (channels >= 3 ? k : 0)];
      image.data[4 * i + 3] = channels === 4 ? bytes[4 * i + 3] : 255;
    }
    return image;
  }

  /** Draw [T], or [T, A] with a line for each of the axis that is shorter. */
  #plot(values, left, top) {
    const [wide, high] = PLOT;
    const [rows, columns = 1] = this.#manifest.shape;
    const along = rows >= columns; // time goes along the longer axis
    const [length, lines] = along ? [rows, columns] : [columns, rows];
    const value = (line, i) => values[along ? i * columns + line : line * columns + i];
    const [least, most] = [Math.min(...values), Math.max(...values)];
    const x = (i) => left + 8 + (i / Math.max(1, length - 1)) * (wide - 16);
    const y = (v) => top + high - 8 - ((v - least) / (most - least || 1)) * (high - 16);
    const context = this.#context;
    context.clearRect(left, top, wide, high);
    context.strokeStyle = getComputedStyle(this.#canvas).color;
    context.globalAlpha = 0.25;
    context.strokeRect(left + 0.5, top + 0.5, wide - 1, high - 1);
    context.globalAlpha = 1;
    for (let line = 0; line < lines; line++) {
      context.beginPath();
      for (let i = 0; i < length; i++) context.lineTo(x(i), y(value(line, i)));
      context.strokeStyle = LINES[line % LINES.length];
      context.stroke();
    }
  }
}
