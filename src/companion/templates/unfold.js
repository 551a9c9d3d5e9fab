// Before the book is printed: everything open, every picture and formula there.
async () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
  for (const image of document.images) image.loading = "eager";
  for (const folded of document.querySelectorAll(".toggle, .dropdown")) {
    folded.classList.remove("toggle", "toggle-hidden", "dropdown");
  }
  await window.MathJax?.startup?.promise;
  await document.fonts.ready;
}
