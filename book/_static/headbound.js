// The theme puts wide tables into boxes that scroll; a keyboard must reach them too.
window.addEventListener("load", () => {
  for (const box of document.querySelectorAll(".pst-scrollable-table-container")) box.tabIndex = 0;
});
// A formula in a line of text that is wider than the line (on a phone) gets a line of its own that scrolls.
window.addEventListener("load", async () => {
  await window.MathJax?.startup?.promise;
  for (const formula of document.querySelectorAll("span.math")) {
    const line = formula.closest("p, li, td, dd, figcaption, caption");
    if (line && formula.getBoundingClientRect().width > line.clientWidth) {
      formula.classList.add("wide");
      formula.tabIndex = 0;
    }
  }
});
