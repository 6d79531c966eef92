// The page: what a person does becomes requests; what the server tells is drawn.

import { ask, send, tab } from "./api.js";
import { Frames } from "./frames.js";
import { bitmapOf, rowsOf } from "./masks.js";
import { drawLanes, frameAt, lostAt } from "./timeline.js";
import { View } from "./view.js";

const $ = (id) => document.getElementById(id);
const view = new View($("view"));
const state = {
  session: null, frames: null, frame: 0, selected: null, tool: "add", live: false, playing: null,
  cursor: null, drag: null, paint: null, image: null, masks: {}, pointers: new Map(), busy: 0,
};
window.tarvis = state; // for whoever looks into the page, and for its tests
let events = null, limits = {};

// What is shown

function say(text, good = false) {
  $("toast").textContent = text;
  $("toast").classList.toggle("good", good);
  clearTimeout(say.timer);
  say.timer = setTimeout(() => { $("toast").textContent = ""; }, 6000);
}

const attempt = (action) => async (...given) => {
  try { return await action(...given); } catch (error) { say(error.message); return undefined; }
};

function selectedThing() { return state.session?.things.find((thing) => thing.id === state.selected); }

function draw() {
  const { session, frame } = state;
  if (!session) return;
  const prompts = session.prompts[state.selected]?.[frame];
  view.draw({ ...state, things: session.things, prompts });
  if (state.cursor) crosshair();
  drawLanes($("lanes"), session, frame, state.selected);
}

function crosshair() {
  const context = $("view").getContext("2d"), [scale, left, top] = view.place();
  const x = left + (state.cursor[0] + 0.5) * scale, y = top + (state.cursor[1] + 0.5) * scale;
  context.strokeStyle = "#7db7ff";
  context.lineWidth = 2;
  context.beginPath();
  context.moveTo(x - 14, y); context.lineTo(x + 14, y); context.moveTo(x, y - 14); context.lineTo(x, y + 14);
  context.stroke();
}

const redraw = () => requestAnimationFrame(draw);

function show() {
  const { session } = state;
  $("welcome").hidden = Boolean(session);
  for (const id of ["delete-session", "export", "new", "follow", "back", "both", "range", "mask-file", "play"]) $(id).disabled = !session;
  if (!session) { $("things").replaceChildren(); return; }
  if (!selectedThing()) state.selected = session.things.at(-1)?.id ?? null;
  $("undo").disabled = !session.can_undo;
  $("redo").disabled = !session.can_redo;
  const running = Boolean(session.running?.total);
  $("cancel").disabled = !running;
  for (const id of ["follow", "back", "both", "range"]) $(id).disabled = running || !session.things.length;
  if (!running) { $("progress").value = 0; }
  // a name that is being typed stays, whatever else changes meanwhile
  if (!$("things").querySelector("input[type=text]")) $("things").replaceChildren(...session.things.map(row));
  const seconds = session.fps ? ` · ${(state.frame / session.fps).toFixed(2)} s` : "";
  $("where").textContent = `${state.frame} of 0–${session.num_frames - 1}${seconds}`;
  const lanes = $("lanes");
  lanes.setAttribute("aria-valuemax", session.num_frames - 1);
  lanes.setAttribute("aria-valuenow", state.frame);
  lanes.setAttribute("aria-valuetext", `frame ${state.frame}`);
  $("hint").textContent = hint(session);
  redraw();
}

function hint(session) {
  if (state.busy) return "…";
  if (!session.things.length) return "Click on an object";
  if (!session.known.frames.length) return "";
  if (session.known.frames.every(([first, last]) => first === last)) return "Press Follow; add points where the mask is wrong";
  return "";
}

function row(thing) {
  const item = document.createElement("li");
  item.dataset.id = thing.id;
  item.classList.toggle("selected", thing.id === state.selected);
  const make = (kind, attributes, text = "") => {
    const node = Object.assign(document.createElement(kind), attributes);
    if (text) node.textContent = text;
    item.append(node);
    return node;
  };
  const color = make("input", { type: "color", value: thing.color });
  color.setAttribute("aria-label", `Colour of ${thing.name}`);
  color.onchange = () => change("edit", { object: thing.id, color: color.value });
  const name = make("button", { className: "select" }, thing.name);
  name.setAttribute("aria-pressed", thing.id === state.selected);
  name.onclick = () => select(thing.id);
  name.ondblclick = () => rename(item, thing);
  const say = (node, text) => { node.title = text; node.setAttribute("aria-label", `${text}: ${thing.name}`); return node; };
  say(make("button", {}, "✎"), "Rename").onclick = () => rename(item, thing);
  say(make("button", {}, thing.is_hidden ? "○" : "●"), thing.is_hidden ? "Show" : "Hide").onclick =
    () => change("edit", { object: thing.id, is_hidden: !thing.is_hidden });
  say(make("button", {}, "✂"), "Remove from this frame on").onclick = () => change("remove", { object: thing.id, frame: state.frame });
  say(make("button", {}, "✕"), "Delete").onclick = () => change("remove", { object: thing.id });
  return item;
}

function rename(item, thing) {
  const input = Object.assign(document.createElement("input"), { type: "text", value: thing.name });
  input.setAttribute("aria-label", "Name");
  item.querySelector(".select").replaceWith(input);
  input.select();
  let done = false;
  const finish = (keep) => {
    if (done) return;
    done = true;
    input.remove();
    if (keep && input.value.trim() && input.value !== thing.name) change("edit", { object: thing.id, name: input.value });
    else show();
  };
  input.onkeydown = (event) => { if (event.key === "Enter") finish(true); if (event.key === "Escape") finish(false); event.stopPropagation(); };
  input.onblur = () => finish(true);
}

// Sessions

function adopt(session, { masks = false } = {}) {
  state.session = session;
  if (masks) state.frames.forget();
  show();
  return goTo(state.frame);
}

const change = attempt(async (action, body = {}) => {
  state.busy++;
  $("hint").textContent = "…";
  try {
    const session = await ask(`/api/sessions/${state.session.id}/${action}`, body);
    if (session.id === state.session?.id) await adopt(session, { masks: true });
    return session;
  } finally { state.busy--; show(); }
});

const reload = attempt(async () => {
  const { id } = state.session, session = await ask(`/api/sessions/${id}`);
  if (state.session?.id === id) await adopt(session, { masks: true });
});

async function enter(session) {
  events?.close();
  next.length = 0;
  if (state.playing) play();
  state.corner = null;
  Object.assign(state, { session, frames: new Frames(session.id, session.num_frames), frame: 0, selected: null, live: false, paint: null, cursor: null });
  location.hash = session.id;
  view.size = session.size;
  view.fit();
  $("from").max = $("to").max = session.num_frames - 1;
  $("from").value = 0;
  $("to").value = session.num_frames - 1;
  listen(session.id);
  show();
  await goTo(+(sessionStorage.getItem(session.id) ?? 0));
}

function leave() {
  events?.close();
  Object.assign(state, { session: null, frames: null });
  history.replaceState(null, "", location.pathname);
  show();
}

async function listSessions() {
  const { sessions, formats, limits: told } = await ask("/api/sessions");
  limits = told;
  const option = (value, text) => Object.assign(document.createElement("option"), { value, textContent: text });
  $("sessions").replaceChildren(option("", sessions.length ? "Sessions…" : "No sessions"), ...sessions.map(({ id, name }) => option(id, name)));
  $("sessions").value = state.session?.id ?? "";
  $("export").replaceChildren(option("", "Save as…"), ...Object.entries(formats).map(([kind, text]) => option(kind, text)));
  return sessions;
}

const openFiles = attempt(async (files) => {
  files = [...files].sort((a, b) => a.name.localeCompare(b.name, undefined, { numeric: true }));
  if (!files.length) return;
  const total = files.reduce((sum, file) => sum + file.size, 0);
  if (total > limits.bytes) throw new Error(`${(total / 2 ** 20).toFixed(0)} MB: at most ${(limits.bytes / 2 ** 20).toFixed(0)} MB are taken`);
  const { id } = await ask("/api/sessions", {});
  let sent = 0;
  try {
    for (const file of files) {
      await send(`/api/sessions/${id}/files?name=${encodeURIComponent(file.name)}`, file, (share) => {
        $("progress").value = (sent + share * file.size) / total;
        $("rate").textContent = `sending ${Math.round(100 * $("progress").value)} %`;
      });
      sent += file.size;
    }
  } catch (error) {
    await ask(`/api/sessions/${id}`, undefined, "DELETE");
    throw error;
  } finally { $("rate").textContent = ""; $("progress").value = 0; }
  await enter(await ask(`/api/sessions/${id}/open?name=${encodeURIComponent(files[0].name)}`, {}));
  await listSessions();
});

const demo = attempt(async () => { await enter(await ask("/api/demo", {})); await listSessions(); });

function listen(id) {
  events = new EventSource(`/api/sessions/${id}/events`);
  events.onmessage = ({ data }) => {
    if (state.session?.id === id) heard(JSON.parse(data));
  };
  let wasLost = false;
  events.onerror = () => { wasLost = true; };
  events.onopen = () => { if (wasLost) { wasLost = false; reload(); } };
}

function heard(event) {
  if (event.kind === "frame" || event.kind === "progress") {
    state.session.running = event;
    $("cancel").disabled = false;
    $("progress").value = event.done / event.total;
    const left = event.rate ? ` · ${Math.ceil((event.total - event.done) / event.rate)} s left` : "";
    $("rate").textContent = `${event.rate.toFixed(1)} frames/s${left}`;
  }
  if (event.kind === "frame") {
    state.frames.masks.set(event.frame, event.masks);
    note(event.frame, event.masks);
    if (state.live) goTo(event.frame, true);
    else if (event.frame === state.frame) goTo(state.frame, true);
    else redraw();
  } else if (event.kind === "end") {
    $("rate").textContent = "";
    if (event.error) { say(event.error); next.length = 0; }
    state.live = false;
    state.session.running = {};
    if (next.length) next.shift()(); else reload();
  } else if (event.kind === "reload" || (event.kind === "changed" && event.by !== tab)) reload();
}

// Note in the lanes what was found in a frame.
function note(frame, masks) {
  const { known } = state.session;
  const put = (ranges, isThere) => {
    const apart = ranges.flatMap(([a, b]) => (frame < a || frame > b ? [[a, b]] : [[a, frame - 1], [frame + 1, b]].filter(([c, d]) => c <= d)));
    if (isThere) apart.push([frame, frame]);
    apart.sort(([a], [b]) => a - b);
    return apart.reduce((all, [a, b]) => {
      if (all.length && a <= all.at(-1)[1] + 1) all.at(-1)[1] = Math.max(b, all.at(-1)[1]); else all.push([a, b]);
      return all;
    }, []);
  };
  known.frames = put(known.frames, true);
  for (const thing of state.session.things) known.shown[thing.id] = put(known.shown[thing.id] ?? [], Boolean(masks[thing.id]));
}

// Where we are

async function goTo(frame, live = false) {
  const { session, frames } = state;
  if (!session) return;
  frame = Math.min(Math.max(frame, 0), session.num_frames - 1);
  if (!live && frame !== state.frame) state.live = false;
  if (frame !== state.frame) state.paint = null;
  state.frame = frame;
  sessionStorage.setItem(session.id, frame);
  if (!live) show();
  try {
    const [image, masks] = await Promise.all([frames.image(frame), frames.masksOf(frame)]);
    if (state.frame !== frame || state.frames !== frames) return;
    Object.assign(state, { image, masks });
    if (!live) frames.ahead(frame);
  } catch (error) { say(error.message); }
  show();
}

function play() {
  if (state.playing) { cancelAnimationFrame(state.playing); state.playing = null; $("play").textContent = "▶"; return; }
  const { session } = state, fps = session.fps ?? 10;
  const first = state.frame >= session.num_frames - 1 ? 0 : state.frame, since = performance.now();
  let wait = false;
  $("play").textContent = "❚❚";
  const step = (now) => {
    const frame = first + Math.floor((now - since) / 1000 * fps);
    if (frame >= session.num_frames - 1) { goTo(session.num_frames - 1); play(); return; }
    if (frame !== state.frame && !wait) { wait = true; goTo(frame).finally(() => { wait = false; }); }
    state.playing = requestAnimationFrame(step);
  };
  state.playing = requestAnimationFrame(step);
}

function jump(frames) {
  const later = frames.filter((frame) => frame > state.frame);
  const target = later.length ? Math.min(...later) : Math.min(...frames);
  if (frames.length) goTo(target); else say("there is no such frame");
}

const given = () => Object.keys(state.session?.given[state.selected] ?? {}).map(Number);

function select(id) { if (id !== state.selected) state.paint = null; state.selected = id; show(); }

let chain = Promise.resolve();
const inOrder = (action) => { chain = chain.then(action, action); return chain; };

// What is given

const give = async (body) => {
  const session = await change("give", { object: state.selected, frame: state.frame, ...body });
  if (session) select(session.object);
};

function point(at, isOn) {
  if (!view.inside(at)) return undefined;
  const [height, width] = view.size;
  at = [Math.min(Math.max(at[0], 0), width - 1), Math.min(Math.max(at[1], 0), height - 1)];
  return inOrder(() => {
    const { points = [], negative = [] } = state.session.prompts[state.selected]?.[state.frame] ?? {};
    return give({ points: isOn ? [...points, at] : points, negative: isOn ? negative : [...negative, at] });
  });
}

const boxOf = ([a, b], [c, d]) => {
  const [height, width] = view.size, clip = (x, most) => Math.min(Math.max(x + 0.5, 0), most);
  const xs = [clip(a, width), clip(c, width)].sort((p, q) => p - q), ys = [clip(b, height), clip(d, height)].sort((p, q) => p - q);
  return [xs[0], ys[0], xs[1], ys[1]];
};

function stroke(at, from) {
  const [height, width] = view.size, radius = +$("size").value / 2, value = state.tool === "brush" ? 1 : 0;
  state.paint ??= bitmapOf(state.masks[state.selected], view.size);
  const steps = Math.max(1, Math.ceil(Math.hypot(at[0] - from[0], at[1] - from[1]) / Math.max(radius / 2, 1)));
  for (let k = 0; k <= steps; k++) {
    const [cx, cy] = [0, 1].map((i) => from[i] + ((at[i] - from[i]) * k) / steps);
    for (let y = Math.max(Math.ceil(cy - radius), 0); y <= Math.min(cy + radius, height - 1); y++) {
      for (let x = Math.max(Math.ceil(cx - radius), 0); x <= Math.min(cx + radius, width - 1); x++) {
        if ((x - cx) ** 2 + (y - cy) ** 2 <= radius ** 2) state.paint[y * width + x] = value;
      }
    }
  }
}

function pick(at) {
  const [x, y] = at.map(Math.round), [height, width] = view.size;
  const under = state.session.things.filter((thing) => !thing.is_hidden && state.masks[thing.id]
    && x >= 0 && y >= 0 && x < width && y < height && bitmapOf(state.masks[thing.id], view.size)[y * width + x]);
  if (under.length) select(under.at(-1).id);
}

async function apply(at) {
  if (!state.session) return;
  if (state.tool === "add" || state.tool === "remove") await point(at, state.tool === "add");
  else if (state.tool === "pick") pick(at);
  else if (state.tool === "box") {
    if (!state.corner) { state.corner = at; say("now the other corner", true); return; }
    const box = boxOf(state.corner, at);
    state.corner = null;
    await give({ box });
  } else { stroke(at, at); await endStroke(); }
}

async function endStroke() {
  const { paint } = state, mask = rowsOf(paint);
  if (mask.length) await inOrder(() => give({ mask })); else say("nothing would be left of it; delete the object instead");
  if (state.paint === paint) state.paint = null;
  redraw();
}

const canvas = $("view");
canvas.addEventListener("pointerdown", (event) => {
  if (!state.session || event.button > 1) return;
  canvas.focus({ preventScroll: true });
  canvas.setPointerCapture(event.pointerId);
  state.pointers.set(event.pointerId, [event.clientX, event.clientY]);
  state.cursor = null;
  const at = view.pixel(event.clientX, event.clientY);
  const pans = event.button === 1 || state.tool === "pick";
  state.down = { at, last: at, screen: [event.clientX, event.clientY], pans, moved: false };
  if (state.pointers.size === 2) { state.down.pinch = true; state.paint = null; state.drag = null; }
  else if (!pans && (state.tool === "brush" || state.tool === "eraser")) { stroke(at, at); redraw(); }
});
canvas.addEventListener("pointermove", (event) => {
  const { down } = state, before = state.pointers.get(event.pointerId);
  if (!down || !before) return;
  const now = [event.clientX, event.clientY];
  state.pointers.set(event.pointerId, now);
  if (Math.hypot(now[0] - down.screen[0], now[1] - down.screen[1]) > 4) down.moved = true;
  if (down.pinch && state.pointers.size === 2) {
    const other = [...state.pointers].find(([id]) => id !== event.pointerId)[1];
    const apart = (p) => Math.hypot(p[0] - other[0], p[1] - other[1]);
    view.shift = view.shift.map((s, k) => s + (now[k] - before[k]) / 2);
    view.zoomAt((now[0] + other[0]) / 2, (now[1] + other[1]) / 2, apart(now) / Math.max(apart(before), 1));
  } else if (down.pans) view.shift = view.shift.map((s, k) => s + now[k] - before[k]);
  else {
    const at = view.pixel(...now);
    if (state.tool === "box") state.drag = boxOf(down.at, at);
    else if (state.paint) stroke(at, down.last);
    down.last = at;
  }
  redraw();
});
const up = attempt(async (event) => {
  const { down } = state;
  state.pointers.delete(event.pointerId);
  if (!down || state.pointers.size) return;
  state.down = null;
  const { drag } = state;
  state.drag = null;
  if (down.pinch || event.type === "pointercancel") { state.paint = null; redraw(); return; }
  if (down.pans) { if (!down.moved && state.tool === "pick") pick(down.at); return; }
  if (state.paint) await endStroke();
  else if (state.tool === "box") { if (drag && drag[2] - drag[0] > 2 && drag[3] - drag[1] > 2) await give({ box: drag }); }
  else await apply(down.at);
});
canvas.addEventListener("pointerup", up);
canvas.addEventListener("pointercancel", up);
canvas.addEventListener("wheel", (event) => {
  event.preventDefault();
  view.zoomAt(event.clientX, event.clientY, Math.exp(-event.deltaY / 400));
  redraw();
}, { passive: false });

// Following

const next = []; // what is begun when the work that runs has ended

const follow = attempt(async (start, end) => {
  if (start === end) { say("there is no other frame in this direction"); return; }
  state.live = true;
  const session = await change("follow", { start, end });
  if (!session) state.live = false;
});
const last = () => state.session.num_frames - 1;
const forwards = () => follow(state.frame, last());
const backwards = () => follow(state.frame, 0);
function bothWays() {
  const { frame } = state;
  if (frame > 0) next.push(() => follow(frame, 0));
  return frame < last() ? follow(frame, last()) : next.shift()();
}
const cancel = () => { next.length = 0; state.live = false; return change("cancel"); };
const find = (task) => change("find", { task, start: +$("from").value, end: +$("to").value });

// Buttons and keys

function tool(name) {
  state.tool = name;
  state.corner = null;
  for (const button of $("tools").children) button.setAttribute("aria-checked", button.dataset.tool === name);
  $("brush-size").hidden = name !== "brush" && name !== "eraser";
  canvas.style.cursor = name === "pick" ? "grab" : "crosshair";
}

const newObject = () => { state.selected = null; return change("add").then((session) => session && select(session.object)); };

const on = (id, action) => { $(id).onclick = () => action(); };
on("undo", () => { next.length = 0; return change("undo"); });
on("redo", () => change("undo", { redo: true }));
on("new", newObject);
on("follow", forwards);
on("back", backwards);
on("both", bothWays);
on("range", () => follow(+$("from").value, +$("to").value));
on("cancel", cancel);
on("first", () => goTo(0));
on("last", () => goTo(last()));
on("previous", () => goTo(state.frame - 1));
on("next", () => goTo(state.frame + 1));
on("play", play);
on("to-given", () => jump(given()));
on("to-lost", () => jump(lostAt(state.session, state.selected)));
on("fit", () => { view.fit(); redraw(); });
on("help", () => $("keys").showModal());
on("import", () => $("files").click());
on("welcome-open", () => $("files").click());
on("welcome-demo", demo);
on("mask-file", () => $("mask-input").click());
on("delete-session", attempt(async () => {
  if (!confirm(`Delete “${state.session.name}” with its masks?`)) return;
  await ask(`/api/sessions/${state.session.id}`, undefined, "DELETE");
  leave();
  await listSessions();
}));
for (const button of document.querySelectorAll("[data-tool]")) button.onclick = () => tool(button.dataset.tool);
for (const button of document.querySelectorAll("[data-find]")) button.onclick = () => find(button.dataset.find);
$("sessions").onchange = attempt(async () => {
  if ($("sessions").value) await enter(await ask(`/api/sessions/${$("sessions").value}`));
});
$("files").onchange = () => openFiles($("files").files).finally(() => { $("files").value = ""; });
$("mask-input").onchange = attempt(async () => {
  const reader = new FileReader(), [file] = $("mask-input").files;
  $("mask-input").value = "";
  if (file.name.endsWith(".json")) { await change("tracks", JSON.parse(await file.text())); return; }
  await new Promise((done) => { reader.onload = done; reader.readAsDataURL(file); });
  await give({ mask: reader.result });
});
$("export").onchange = attempt(async () => {
  const kind = $("export").value;
  $("export").value = "";
  say("writing…", true);
  const answer = await fetch(`/api/sessions/${state.session.id}/export/${kind}`);
  if (!answer.ok) throw new Error((await answer.json()).error);
  const name = /filename\*?=(?:utf-8'')?"?([^";]+)/i.exec(answer.headers.get("content-disposition") ?? "")?.[1] ?? kind;
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(await answer.blob()), download: decodeURIComponent(name) });
  link.click();
  URL.revokeObjectURL(link.href);
  say("saved", true);
});
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => { event.preventDefault(); openFiles(event.dataTransfer.files); });

const lanes = $("lanes");
let isScrubbing = false;
const scrub = (event) => { if (state.session) goTo(frameAt(lanes, state.session, event.clientX)); };
lanes.addEventListener("pointerdown", (event) => {
  isScrubbing = true;
  lanes.setPointerCapture(event.pointerId);
  if (state.session) {
    const box = lanes.getBoundingClientRect(), room = (box.height - 14) / Math.max(state.session.things.length, 3);
    const thing = state.session.things[Math.floor((event.clientY - box.top - 14) / room)];
    if (thing && thing.id !== state.selected) select(thing.id);
  }
  scrub(event);
});
lanes.addEventListener("pointermove", (event) => { if (isScrubbing) scrub(event); });
lanes.addEventListener("pointerup", () => { isScrubbing = false; });

const KEYS = [
  ["ArrowLeft", "frame before (Shift: ten)", (event) => move(event, -1, 0)],
  ["ArrowRight", "next frame (Shift: ten)", (event) => move(event, 1, 0)],
  ["ArrowUp", "with the cross: up", (event) => move(event, 0, -1)],
  ["ArrowDown", "with the cross: down", (event) => move(event, 0, 1)],
  ["Home", "first frame", () => goTo(0)],
  ["End", "last frame", () => goTo(last())],
  [" ", "play, pause", play],
  ["c", "a cross that the arrows move, instead of the mouse", () => { state.cursor = state.cursor ? null : [view.size[1] / 2, view.size[0] / 2].map(Math.round); redraw(); }],
  ["Enter", "use the tool at the cross", () => state.cursor && apply(state.cursor)],
  ["1", "points on the object", () => tool("add")],
  ["2", "points beside it", () => tool("remove")],
  ["3", "box", () => tool("box")],
  ["4", "brush", () => tool("brush")],
  ["5", "eraser", () => tool("eraser")],
  ["6", "select, move the picture", () => tool("pick")],
  ["n", "new object", newObject],
  ["Tab", "", null],
  ["[", "object before", () => cycle(-1)],
  ["]", "next object", () => cycle(1)],
  ["h", "hide or show the object", () => selectedThing() && change("edit", { object: state.selected, is_hidden: !selectedThing().is_hidden })],
  ["x", "remove the object from this frame on", () => selectedThing() && change("remove", { object: state.selected, frame: state.frame })],
  ["Delete", "delete the object", () => selectedThing() && change("remove", { object: state.selected })],
  ["r", "rename the object", () => selectedThing() && rename(document.querySelector(`#things li[data-id="${state.selected}"]`), selectedThing())],
  ["f", "follow forwards (Shift: backwards)", (event) => (event.shiftKey ? backwards() : forwards())],
  ["b", "follow both ways", bothWays],
  ["Escape", "stop; what is done is kept", () => state.session.running?.total && cancel()],
  ["g", "next frame where the object is given", () => jump(given())],
  ["l", "next frame where it is lost", () => jump(lostAt(state.session, state.selected))],
  ["+", "larger", () => zoom(1.25)],
  ["-", "smaller", () => zoom(0.8)],
  ["0", "the whole frame", () => { view.fit(); redraw(); }],
  ["o", "open a file", () => $("files").click()],
  ["?", "these keys", () => $("keys").showModal()],
];

function move(event, dx, dy) {
  const far = event.shiftKey ? 10 : 1;
  if (!state.cursor) { if (dx) goTo(state.frame + dx * far); return; }
  const [height, width] = view.size, step = Math.max(1, Math.round(Math.min(height, width) / 200));
  const clip = (value, most) => Math.min(Math.max(value, 0), most - 1);
  state.cursor = [clip(state.cursor[0] + dx * step * far, width), clip(state.cursor[1] + dy * step * far, height)];
  redraw();
}

function zoom(factor) {
  const box = canvas.getBoundingClientRect();
  view.zoomAt(box.left + box.width / 2, box.top + box.height / 2, factor);
  redraw();
}

function cycle(step) {
  const { things } = state.session, at = things.findIndex((thing) => thing.id === state.selected);
  if (things.length) select(things[(at + step + things.length) % things.length].id);
}

document.addEventListener("keydown", (event) => {
  if (event.target.matches("input, select") || $("keys").open) return; // a dialog just closed may still have the focus
  if (event.repeat && !event.key.startsWith("Arrow")) return;
  const isOnButton = event.target.matches("button") && (event.key === "Enter" || event.key === " ");
  if (isOnButton || event.altKey) return;
  if (event.ctrlKey || event.metaKey) {
    if (event.key.toLowerCase() !== "z" || !state.session) return;
    event.preventDefault();
    change("undo", { redo: event.shiftKey });
    return;
  }
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const found = KEYS.find(([name, , action]) => name === key && action);
  if (!found || (!state.session && key !== "?" && key !== "o")) return;
  event.preventDefault();
  found[2](event);
});

$("key-table").append(...[...KEYS.filter(([, text]) => text), ["Ctrl Z", "undo (Shift: redo)"]].map(([key, text]) => {
  const line = document.createElement("tr"), left = document.createElement("td"), right = document.createElement("td");
  left.append(Object.assign(document.createElement("kbd"), { textContent: key === " " ? "Space" : key }));
  right.textContent = text;
  line.append(left, right);
  return line;
}));

new ResizeObserver(redraw).observe($("stage"));
new ResizeObserver(redraw).observe(lanes);
tool("add");
show();
attempt(async () => {
  const sessions = await listSessions(), wanted = location.hash.slice(1);
  if (sessions.some(({ id }) => id === wanted)) await enter(await ask(`/api/sessions/${wanted}`));
  $("sessions").value = state.session?.id ?? "";
  document.body.dataset.ready = "yes";
})();
