// The theme puts wide tables into boxes that scroll; a keyboard must reach them too.
window.addEventListener("load", () => {
  for (const box of document.querySelectorAll(".pst-scrollable-table-container")) box.tabIndex = 0;
});
// A formula in a line of text that is wider than the line (on a phone) shrinks to it, or scrolls where that were too small.
window.addEventListener("load", async () => {
  await window.MathJax?.startup?.promise;
  for (const formula of document.querySelectorAll("span.math")) {
    const line = formula.closest("p, li, td, dd, figcaption, caption");
    if (!line || formula.getBoundingClientRect().width <= line.clientWidth) continue;
    formula.classList.add("wide");
    const share = formula.clientWidth / formula.scrollWidth;
    if (share > 0.65) formula.style.fontSize = `${Math.floor(100 * share) - 1}%`;
    else formula.tabIndex = 0;
  }
});
