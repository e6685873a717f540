// The service worker of an export: it caches the page, so that it opens without a connection. The page itself caches the model.
"use strict";
const prefix = "tinyllama_jax " + self.registration.scope + " ", name = prefix + VERSION;
const shell = ["./", "manifest.json", "icon-192.png", "icon-512.png", "wllama/index.min.js"].map(path => new URL(path, self.registration.scope).href);

self.addEventListener("install", event => event.waitUntil((async () => {
  await (await caches.open(name)).addAll(shell.map(url => new Request(url, { cache: "no-cache" })));
  await self.skipWaiting();
})()));

// an older export at this address: its cache is removed, model included
self.addEventListener("activate", event => event.waitUntil((async () => {
  for (const key of await caches.keys()) if (key.startsWith(prefix) && key !== name) await caches.delete(key);
  await self.clients.claim();
})()));

self.addEventListener("fetch", event => {
  const url = event.request.url.replace(/[?#].*/, "").replace(/\/index\.html$/, "/");
  if (event.request.method !== "GET" || !shell.includes(url)) return;
  event.respondWith((async () => await (await caches.open(name)).match(url, { ignoreVary: true }) || fetch(event.request))());
});
