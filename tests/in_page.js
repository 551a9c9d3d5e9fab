// What a browser finds wrong with a page that is open: a list of sentences.
() => {
  const SIDEWAYS = 2; // pixels of a code block that may be out of sight: rounding
  const found = [];
  const start = (node) => node.textContent.trim().slice(0, 40);
  for (const image of document.images) {
    const source = image.getAttribute("src") || "";
    const alt = (image.getAttribute("alt") || "").trim();
    const file = source.split("/").pop();
    if (!(image.complete && image.naturalWidth)) found.push(`broken image ${source}`);
    if (image.closest("figure, .cell_output") && (!alt || alt.includes(file))) {
      found.push(`image without alt text ${file}`);
    }
  }
  const alts = [...document.images].map((image) => image.alt).filter((alt) => alt.length > 20);
  if (new Set(alts).size < alts.length) found.push("two images with the same alt text");
  for (const figure of document.querySelectorAll("figure")) {
    const image = figure.querySelector("img");
    const caption = figure.querySelector(".caption-text") || figure.querySelector("figcaption");
    if (!image || !caption) continue;
    const words = caption.textContent.replace(/[#¶]$/, "").trim();
    const sentences = words.split(/(?<=[^\s.][.!?])\s+(?=[A-ZÀ-Þ])/).length;
    if (sentences > 2) found.push(`caption of ${sentences} sentences: ${start(caption)}`);
    if (image.alt.trim() === words) found.push(`alt text that repeats the caption: ${words}`);
  }
  for (const code of document.querySelectorAll("div.highlight pre")) {
    const hidden = code.scrollWidth - code.clientWidth;
    if (code.clientWidth && hidden > SIDEWAYS) {
      found.push(`code that scrolls sideways by ${hidden} pixels: ${start(code)}`);
    }
  }
  for (const math of document.querySelectorAll(".math")) {
    if (!math.querySelector("mjx-container")) found.push(`formula not rendered: ${start(math)}`);
  }
  for (const error of document.querySelectorAll("mjx-merror")) {
    found.push(`formula with an error: ${error.textContent}`);
  }
  const wide = document.documentElement.scrollWidth - window.innerWidth;
  if (wide > 0) found.push(`wider than the page by ${wide} pixels`);
  for (const link of document.querySelectorAll('a[href^="#"]')) {
    const target = decodeURIComponent(link.getAttribute("href").slice(1));
    if (target && !document.getElementById(target)) {
      found.push(`link to a missing place #${target}`);
    }
  }
  return found;
}
