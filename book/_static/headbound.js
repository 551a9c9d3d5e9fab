// The theme puts wide tables into boxes that scroll; a keyboard must reach them too.
window.addEventListener("load", () => {
  for (const box of document.querySelectorAll(".pst-scrollable-table-container")) box.tabIndex = 0;
});
