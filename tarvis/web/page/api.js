// Requests to the server. Every answer to a change is the session's new state.

export const tab = Math.random().toString(36).slice(2);

export async function ask(path, body, method) {
  const answer = await fetch(path, {
    method: method ?? (body === undefined ? "GET" : "POST"),
    headers: { "X-Tab": tab },
    body: body === undefined ? undefined : JSON.stringify(body),
  });
  const tree = await answer.json().catch(() => ({ error: "the server did not answer as expected" }));
  if (!answer.ok) throw new Error(tree.error ?? answer.statusText);
  return tree;
}

// A file, with progress from 0 to 1; XMLHttpRequest since fetch tells nothing about what was sent.
export function send(path, file, progress) {
  return new Promise((done, failed) => {
    const request = new XMLHttpRequest();
    request.open("POST", path);
    request.upload.onprogress = (event) => progress(event.loaded / event.total);
    request.onerror = () => failed(new Error("the upload was broken off"));
    request.onload = () => {
      let tree = {};
      try { tree = JSON.parse(request.responseText); } catch { /* told below */ }
      if (request.status === 200) done(tree);
      else failed(new Error(tree.error ?? "the upload failed"));
    };
    request.send(file);
  });
}
