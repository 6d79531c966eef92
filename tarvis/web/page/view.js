// The canvas: the frame, the masks over it, prompts; zoom and pan; from the screen to pixels of the video.

import { bitmapOf, tinted } from "./masks.js";
import { scaled } from "./timeline.js";

export class View {
  constructor(canvas) {
    this.canvas = canvas;
    this.size = [1, 1];
    this.fit();
    this.painted = new Map(); // `${code} ${color}` -> canvas
  }

  fit() { this.zoom = 1; this.shift = [0, 0]; }

  // Scale from pixels of the video to the screen, and where its corner lies.
  place() {
    const [height, width] = this.size, { clientWidth: w, clientHeight: h } = this.canvas;
    const scale = Math.min(w / width, h / height) * this.zoom;
    return [scale, (w - scale * width) / 2 + this.shift[0], (h - scale * height) / 2 + this.shift[1]];
  }

  // (x, y) of the pixel of the video below a place on the screen; its middle is a whole number.
  pixel(clientX, clientY) {
    const box = this.canvas.getBoundingClientRect(), [scale, left, top] = this.place();
    return [(clientX - box.left - left) / scale - 0.5, (clientY - box.top - top) / scale - 0.5];
  }

  inside([x, y]) { return x >= -0.5 && y >= -0.5 && x < this.size[1] - 0.5 && y < this.size[0] - 0.5; }

  zoomAt(clientX, clientY, factor) {
    const box = this.canvas.getBoundingClientRect();
    const zoom = Math.min(Math.max(this.zoom * factor, 1), 20), by = zoom / this.zoom;
    const middle = [box.left + box.width / 2, box.top + box.height / 2];
    this.shift = [clientX, clientY].map((at, k) => (at - middle[k]) * (1 - by) + this.shift[k] * by);
    this.zoom = zoom;
    if (zoom === 1) this.shift = [0, 0];
  }

  draw({ image, masks, things, selected, prompts, drag, paint }) {
    const context = scaled(this.canvas), [scale, left, top] = this.place(), [height, width] = this.size;
    context.clearRect(0, 0, this.canvas.clientWidth, this.canvas.clientHeight);
    if (!image) return;
    context.imageSmoothingEnabled = scale < 3;
    context.drawImage(image, left, top, scale * width, scale * height);
    context.imageSmoothingEnabled = false;
    for (const thing of things) {
      if (thing.is_hidden || (paint && thing.id === selected)) continue;
      if (masks[thing.id]) context.drawImage(this.mask(masks[thing.id], thing.color), left, top, scale * width, scale * height);
    }
    const color = things.find((thing) => thing.id === selected)?.color ?? "#ffffff";
    if (paint) context.drawImage(tinted(paint, this.size, color), left, top, scale * width, scale * height);
    const to = ([x, y]) => [left + (x + 0.5) * scale, top + (y + 0.5) * scale];
    const dot = (at, fill, sign) => {
      const [x, y] = to(at);
      context.beginPath();
      context.arc(x, y, 7, 0, 7);
      context.fillStyle = fill;
      context.fill();
      context.strokeStyle = "#fff";
      context.lineWidth = 2;
      context.stroke();
      context.fillStyle = "#fff";
      context.font = "bold 13px sans-serif";
      context.textAlign = "center";
      context.textBaseline = "middle";
      context.fillText(sign, x, y + 0.5);
    };
    for (const at of prompts?.points ?? []) dot(at, "#1d9f62", "+");
    for (const at of prompts?.negative ?? []) dot(at, "#c03745", "–");
    const box = drag ?? prompts?.box;
    if (box) {
      context.strokeStyle = color;
      context.lineWidth = 2;
      context.setLineDash([6, 4]);
      context.strokeRect(left + box[0] * scale, top + box[1] * scale, (box[2] - box[0]) * scale, (box[3] - box[1]) * scale);
      context.setLineDash([]);
    }
  }

  mask(code, color) {
    const key = `${code} ${color}`;
    let found = this.painted.get(key);
    if (!found) found = tinted(bitmapOf(code, this.size), this.size, color);
    this.painted.delete(key);
    this.painted.set(key, found);
    while (this.painted.size > 64) this.painted.delete(this.painted.keys().next().value);
    return found;
  }
}
