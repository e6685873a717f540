// -- where answers come from: wllama, which is llama.cpp in WebAssembly, on this device --------------------------------
//
// EXPORT is what `web.py` knows: name, chat, template, stop, context, version, files (path -> bytes), parts of the model.

let wllama = null;
let kept = null;    // the browser's cache of what has been loaded; null: it has none
let crashed = null; // a promise that is rejected if the WebAssembly program dies
let ratio = 0.4;    // tokens per character, measured anew with each answer

const MEMORY = /memory|alloc|out of bounds|\(abort\)/i;

class Plain extends Error {}    // an error whose message can be shown to the user as it is

// The text to show for an error of WebAssembly, of wllama or of this page.
function plain(error) {
  const what = String(error && error.message || error).slice(0, 200), size = megabytes(EXPORT.parts.reduce((sum, path) => sum + EXPORT.files[path], 0));
  if (error instanceof Plain) return error.message;
  if (MEMORY.test(what)) {
    return `This device has too little free memory for the model of ${size}. Close other tabs and apps and reload, or take a smaller model. (${what})`;
  }
  if (error instanceof WebAssembly.CompileError || /compile|wasm|exception handling|SIMD/i.test(what)) {
    return `This browser is too old to run the model: its WebAssembly lacks what is needed. Update it. (${what})`;
  }
  return `The model stopped: ${what}. Reload the page.`;
}

const megabytes = n => (n / 1e6).toFixed(n < 1e7 ? 1 : 0) + " MB";

// A file of this export as a Blob: from the cache, or else from the server, and then it is cached.
async function get(path, type, arrived) {
  const url = new URL(path, location.href).href, size = EXPORT.files[path];
  const before = kept && await kept.match(url);
  if (before) {
    arrived(size);
    return new Blob([await before.blob()], { type });
  }
  const reload = `Reload the page to go on${kept ? "; what is loaded is kept" : ""}.`;
  const response = await fetch(url, { cache: "no-store" }).catch(() => {
    throw new Plain(`${path} cannot be loaded: no connection to the server. ${reload}`);
  });
  if (!response.ok) throw new Plain(`${path} is missing: the server answers ${response.status}. It belongs beside this page; upload all files of the export.`);
  const counted = response.body.pipeThrough(new TransformStream({
    transform(chunk, controller) { arrived(chunk.byteLength); controller.enqueue(chunk); }
  }));
  let blob = null;
  try {
    const whole = new Response(counted);
    if (kept) {
      await kept.put(url, whole);
      blob = await (await kept.match(url)).blob();
    } else {
      blob = await whole.blob();
    }
  } catch (error) {
    if (!kept || error.name !== "QuotaExceededError") throw new Plain(`${path} cannot be loaded: the connection broke off. ${reload}`);
    kept = null;    // no room in the cache: keep it in memory
    arrived(-Infinity);
    return get(path, type, arrived);
  }
  if (blob.size !== size) {
    if (kept) await kept.delete(url);
    throw new Plain(`${path} is damaged: it has ${blob.size} bytes, not ${size}. Upload it again.`);
  }
  return new Blob([blob], { type });
}

// A Wllama whose WebAssembly is at these addresses. Safari and old browsers need the slower one in `compat`.
function make(Wllama, main, compat, logger) {
  const nothing = {};    // in place of its own cache, which needs https and would keep the model twice
  const one = new Wllama({ default: main }, { cacheManager: nothing, modelManager: nothing, logger });
  one.setCompat(compat);
  return one;
}

async function load() {
  if (typeof WebAssembly !== "object") throw new Plain("This browser has no WebAssembly, which runs the model. Update it, or take Chrome, Edge, Firefox or Safari; in Safari, lockdown mode switches it off.");
  kept = self.caches ? await caches.open(`tinyllama_jax ${new URL("./", location.href).href} ${EXPORT.version}`).catch(() => null) : null;
  const { Wllama } = await import("./wllama/index.min.js").catch(() => {
    throw new Plain("wllama/index.min.js cannot be loaded. It belongs beside this page; upload all files of the export.");
  });
  const needs = make(Wllama, "wllama/wllama.wasm", { wasm: "wllama/compat.wasm", worker: "wllama/compat.js" }, console).getWorkerResources();
  const program = needs.compat ? "wllama/compat.wasm" : "wllama/wllama.wasm", paths = [program, ...EXPORT.parts];
  const total = paths.reduce((sum, path) => sum + EXPORT.files[path], 0);
  let shown = "", done = 0, before = 0;
  const arrived = n => {
    before = n === -Infinity ? done : before + n;
    const text = `Loading ${Math.floor(100 * before / total)}% of ${megabytes(total)} ...`;
    if (text !== shown) say(shown = text);
  };
  const blobs = [];
  for (const path of paths) {
    blobs.push(await get(path, path === program ? "application/wasm" : "", arrived));
    done += EXPORT.files[path];
  }
  // from memory and not by address: the worker need not reach the cache, and a server may give .wasm any type
  const address = URL.createObjectURL(blobs.shift());
  const worker = needs.compat && { code: await (await get("wllama/compat.js", "", () => {})).text() };
  say("Starting the model ...");
  let crash, log = "";
  crashed = new Promise((_, reject) => { crash = reject; });
  crashed.catch(() => {});    // no warning if nobody waits for it
  const error = what => { what instanceof ErrorEvent ? crash(new Error(what.message)) : log += what + " "; };
  const logger = { debug() {}, log() {}, warn() {}, error };
  wllama = make(Wllama, address, worker ? { wasm: address, worker } : null, logger);
  const options = { n_ctx: EXPORT.context, n_parallel: 1, n_threads: 1, n_gpu_layers: 0 };
  if (EXPORT.chat) Object.assign(options, { chat_template: EXPORT.template, jinja: true });
  await Promise.race([wllama.loadModel(blobs, options), crashed]);
  if (wllama.getLoadedContextInfo().success) return;    // wllama 3.13 reports a failure nowhere else
  if (MEMORY.test(log)) throw new Error(log);
  if (kept) for (const path of EXPORT.parts) await kept.delete(new URL(path, location.href).href);
  throw new Plain(`The model's files are damaged. Reload the page to load them again; if that does not help, upload them again. (${log.slice(0, 200)})`);
}

// Leaves out the oldest question and its answer; false if there is no older one.
function drop(messages) {
  const first = messages.findIndex(message => message.role !== "system"), next = messages.findIndex((message, i) => i > first && message.role === "user");
  if (next > 0) messages.splice(first, next - first);
  return next > 0;
}

// The events of an answer of wllama. Its own iterator leaves an uncaught error when the user stops the answer.
async function* written(call, request) {
  const events = [];
  let over = false, failure = null, wake = () => {};
  wllama[call]({ ...request, onData: event => { events.push(event); wake(); } })
    .catch(error => { failure = error; })
    .finally(() => { over = true; wake(); });
  for (;;) {
    while (events.length) yield events.shift();
    if (failure) throw failure;
    if (over) return;
    await Promise.race([new Promise(go => { wake = go; }), crashed]);
  }
}

async function* ask(asked, signal) {
  const call = asked.messages ? "createChatCompletion" : "createCompletion", messages = asked.messages, before = messages && messages.length;
  const characters = () => messages.reduce((sum, message) => sum + message.content.length + 20, 0);
  const room = EXPORT.context - Math.min(asked.max_tokens, EXPORT.context / 4);
  while (messages && characters() * ratio > room && drop(messages));
  for (;;) {
    try {
      if (messages && messages.length < before) yield { choices: [], note: `The oldest ${before - messages.length} messages no longer fit and were left out. ` };
      for await (const event of written(call, { ...asked, stop: EXPORT.stop, abortSignal: signal })) {
        if (event.usage && messages) ratio = event.usage.prompt_tokens / characters();
        yield event;
      }
      return;
    } catch (error) {
      if (error.name === "AbortError") throw error;
      const full = /exceed|context size|too (long|large)/i.test(error.message);
      if (full && messages && drop(messages)) continue;
      throw new Error(full ? `the text is too long: the model takes ${EXPORT.context} tokens, about ${Math.floor(EXPORT.context / ratio)} characters.` : plain(error));
    }
  }
}

async function begin() {
  draw();
  $("name").textContent = EXPORT.name;
  $("most").value = 256;
  const worker = navigator.serviceWorker && await navigator.serviceWorker.register("sw.js").catch(() => null);
  try {
    await load();
  } catch (error) {
    return say(plain(error), true);
  }
  model = { id: EXPORT.name, chat: EXPORT.chat };
  ready();
  const offline = worker && kept && await navigator.serviceWorker.ready;
  say($("status").textContent + (offline ? " It works without a connection." : " It needs a connection the next time: " + (self.isSecureContext ? "the browser has no room to keep it." : "browsers keep only pages served over https.")));
  if (offline && navigator.storage && navigator.storage.persist) await navigator.storage.persist().catch(() => false);
}
begin();
