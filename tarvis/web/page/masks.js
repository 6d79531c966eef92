// COCO's run-length codes: runs go down the columns, zeros first, as numbers in base 32.

export function runsOf(code) {
  const runs = [];
  for (let at = 0; at < code.length;) {
    let value = 0, shift = 0, digit;
    do {
      digit = code.charCodeAt(at++) - 48;
      value += (digit & 31) * 2 ** shift;
      shift += 5;
    } while (digit & 32);
    if (digit & 16) value -= 2 ** shift;
    runs.push(runs.length > 2 ? value + runs[runs.length - 2] : value);
  }
  return runs;
}

// Calls paint(x, y) for every pixel of a mask.
export function pixelsOf(code, height, paint) {
  let at = 0;
  runsOf(code).forEach((count, k) => {
    if (k % 2) for (let i = at; i < at + count; i++) paint(Math.floor(i / height), i % height);
    at += count;
  });
}

export function bitmapOf(code, [height, width]) {
  const bits = new Uint8Array(height * width);
  if (code) pixelsOf(code, height, (x, y) => { bits[y * width + x] = 1; });
  return bits;
}

// Runs [first, how many] in rows, as the server takes masks that were painted.
export function rowsOf(bits) {
  const runs = [];
  for (let i = 0; i < bits.length; i++) {
    if (!bits[i]) continue;
    const first = i;
    while (i < bits.length && bits[i]) i++;
    runs.push([first, i - first]);
  }
  return runs;
}

// A canvas with the mask in a colour, outlined.
export function tinted(bits, [height, width], color) {
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d");
  const image = context.createImageData(width, height);
  const rgb = [1, 3, 5].map((k) => parseInt(color.slice(k, k + 2), 16));
  for (let y = 0, i = 0; y < height; y++) {
    for (let x = 0; x < width; x++, i++) {
      if (!bits[i]) continue;
      const inside = x > 0 && x < width - 1 && y > 0 && y < height - 1
        && bits[i - 1] && bits[i + 1] && bits[i - width] && bits[i + width];
      image.data.set([...rgb, inside ? 125 : 255], 4 * i);
    }
  }
  context.putImageData(image, 0, 0);
  return canvas;
}
