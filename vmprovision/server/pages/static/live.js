// Say so when the server does not answer: what a page shows is then older than it looks.
"use strict";
const note = document.getElementById("stale");
const say = (isStale) => {
  const text = isStale ? note.dataset.text : "";
  if (note.textContent !== text) note.textContent = text;
};
for (const name of ["htmx:sendError", "htmx:timeout", "htmx:responseError"])
  document.addEventListener(name, () => say(true));
document.addEventListener("htmx:afterRequest", (event) => { if (event.detail.successful) say(false); });
