/* Requests. Addresses are relative: the page may lie at the root or below the name of its run. */
class Refused extends Error {
  constructor(values, status) {
    super([values.error, values.hint].filter(Boolean).join("\n"));
    this.status = status;
  }
}

export async function answer(response) {
  const text = await response.text();
  let values = {};
  try {
    values = JSON.parse(text);
  } catch {
    throw new Refused({ error: `the page answered with status ${response.status}` }, response.status);
  }
  if (!response.ok) throw new Refused(values, response.status);
  return values;
}

export const get = async (path) => answer(await fetch(`api/${path}`, { headers: { Accept: "application/json" } }));

export const post = async (path, body = {}) =>
  answer(await fetch(`api/${path}`, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) }));

/* A file's name as the archive would write it: what cannot be printed is replaced, as the page takes no such names. */
const plain = (name) => name.replace(/[\p{C}\p{Z}]/gu, (character) => (character === " " ? " " : "_"));

/* A request that tells how far it is, which fetch cannot. */
export function put(file, progressed) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("PUT", `api/inbox/${encodeURIComponent(plain(file.name))}`);
    request.upload.addEventListener("progress", (event) => progressed(event.loaded, file.size));
    request.addEventListener("error", () => reject(new Refused({ error: "the connection broke, or the file cannot be read", hint: "Nothing of the file was kept." }, 0)));
    request.addEventListener("load", () => {
      let values = { error: `the page answered with status ${request.status}` };
      try { values = JSON.parse(request.responseText); } catch { /* said by the status */ }
      if (request.status === 201) resolve(values);
      else reject(new Refused(values, request.status));
    });
    request.send(file);
  });
}
