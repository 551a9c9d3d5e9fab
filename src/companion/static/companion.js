// The theme puts wide tables into boxes that scroll; a keyboard must reach them too.
window.addEventListener("load", () => {
  for (const box of document.querySelectorAll(".pst-scrollable-table-container")) box.tabIndex = 0;
});
// A formula in a line of text that is wider than the line (on a phone) shrinks to it, or scrolls where that were too small.
const LINE = "p, li, td, dd, figcaption, caption";
const room = (formula) => formula.closest(LINE)?.clientWidth / formula.getBoundingClientRect().width;
window.addEventListener("load", async () => {
  await window.MathJax?.startup?.promise;
  for (const formula of document.querySelectorAll(".bd-article span.math > mjx-container")) {
    const share = room(formula);
    if (!(share < 1)) continue;
    const box = formula.parentElement;
    box.classList.add("wide");
    if (share > 0.65) box.style.fontSize = `${Math.floor(100 * share) - 1}%`;
    if (room(formula) < 1) box.tabIndex = 0;
  }
});
