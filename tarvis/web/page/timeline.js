// The lanes below the video: where each object was given, corrected, lost or hidden, and where we are.

const TOP = 14;

export function drawLanes(canvas, session, frame, selected) {
  const context = scaled(canvas), width = canvas.clientWidth, height = canvas.clientHeight;
  context.fillStyle = "#0b0d11";
  context.fillRect(0, 0, width, height);
  if (!session) return;
  const count = session.num_frames, step = width / count;
  const x = (k) => k * step;
  const things = session.things, room = (height - TOP) / Math.max(things.length, 3);
  context.fillStyle = "#2a313d";
  for (const [first, last] of session.known.frames) context.fillRect(x(first), 0, x(last + 1) - x(first), 4);
  things.forEach((thing, row) => {
    const y = TOP + row * room, lane = Math.max(room - 4, 2);
    context.globalAlpha = thing.is_hidden ? 0.25 : 1;
    context.fillStyle = thing.id === selected ? "#2f3848" : "#1a1f28";
    context.fillRect(0, y, width, lane);
    context.fillStyle = thing.color;
    for (const [first, last] of session.known.shown[thing.id] ?? []) {
      context.fillRect(x(first), y + lane * 0.2, Math.max(x(last + 1) - x(first), 1), lane * 0.6);
    }
    for (const [at, isThere] of Object.entries(session.given[thing.id] ?? {})) {
      const middle = x(+at + 0.5), size = Math.min(lane / 2 + 1, 7);
      context.fillStyle = isThere ? "#fff" : "#ff7b7b";
      context.beginPath();
      if (isThere) context.arc(middle, y + lane / 2, size, 0, 7);
      else context.rect(middle - size / 2, y, size, lane);
      context.fill();
    }
    context.globalAlpha = 1;
  });
  context.fillStyle = "#7db7ff";
  context.fillRect(x(frame + 0.5) - 1, 0, 2, height);
}

export function frameAt(canvas, session, clientX) {
  const box = canvas.getBoundingClientRect();
  const share = (clientX - box.left) / box.width;
  return Math.min(Math.max(Math.floor(share * session.num_frames), 0), session.num_frames - 1);
}

export function scaled(canvas) {
  const ratio = window.devicePixelRatio || 1;
  const width = Math.round(canvas.clientWidth * ratio), height = Math.round(canvas.clientHeight * ratio);
  if (canvas.width !== width || canvas.height !== height) { canvas.width = width; canvas.height = height; }
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  return context;
}

// The first and last frame of gaps in which an object that was followed is not seen.
export function lostAt(session, id) {
  const shown = session.known.shown[id] ?? [];
  const seen = (k) => shown.some(([first, last]) => first <= k && k <= last);
  const lost = [];
  for (const [first, last] of session.known.frames) {
    for (const [, end] of shown) if (end >= first && end < last && !seen(end + 1)) lost.push(end + 1);
  }
  return lost;
}
