// Frames and masks of the session that is shown, kept for a while.

import { ask } from "./api.js";

const KEPT = 120;
const AHEAD = 12;
const BLOCK = 128;

export class Frames {
  constructor(id, count) {
    this.base = `/api/sessions/${id}`;
    this.count = count;
    this.images = new Map(); // frame -> promise of an ImageBitmap
    this.masks = new Map(); // frame -> {object: code}
    this.blocks = new Map(); // block of masks -> promise
  }

  image(frame) {
    let found = this.images.get(frame);
    if (!found) {
      found = fetch(`${this.base}/frames/${frame}`).then(async (answer) => {
        if (!answer.ok) throw new Error((await answer.json()).error);
        return createImageBitmap(await answer.blob());
      });
      found.catch(() => this.images.delete(frame));
    }
    this.images.delete(frame);
    this.images.set(frame, found); // the last one used is the last to go
    while (this.images.size > KEPT) this.images.delete(this.images.keys().next().value);
    return found;
  }

  ahead(frame) {
    for (let k = frame + 1; k <= Math.min(frame + AHEAD, this.count - 1); k++) this.image(k).catch(() => {});
  }

  async masksOf(frame) {
    const block = Math.floor(frame / BLOCK);
    if (!this.blocks.has(block)) {
      const { masks: all, blocks } = this, range = `${block * BLOCK}/${block * BLOCK + BLOCK - 1}`;
      const asked = ask(`${this.base}/masks/${range}`).then((tree) => {
        for (const [k, masks] of Object.entries(tree)) if (!all.has(+k)) all.set(+k, masks);
      });
      asked.catch(() => blocks.delete(block));
      blocks.set(block, asked);
    }
    await this.blocks.get(block);
    return this.masks.get(frame) ?? {};
  }

  forget() { // masks may have changed anywhere
    this.masks = new Map();
    this.blocks = new Map();
  }
}
