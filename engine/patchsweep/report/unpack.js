// Runs the page's scripts in order, of which long ones are packed by gzip; the page's policy names
// the digest of each.
(async () => {
  "use strict";
  for (const part of document.querySelectorAll("script[data-script]")) {
    let text = part.textContent;
    if (part.dataset.script === "gzip") {
      const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
      const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
      text = await new Response(stream).text();
    }
    const script = document.createElement("script");
    script.textContent = text;
    document.body.append(script);
  }
  document.body.dataset.ready = "yes";
})().catch((error) => {
  const note = document.createElement("p");
  note.className = "notice warn";
  note.textContent = `The figures need a browser of 2023 or later (${error}).`;
  document.querySelector("main").prepend(note);
});
