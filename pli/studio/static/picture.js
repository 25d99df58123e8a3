// One picture with a text that stands for it, and a line below.
function render({ model, el }) {
  const figure = document.createElement("figure");
  figure.className = "pli-picture";
  const img = document.createElement("img");
  const words = document.createElement("figcaption");
  figure.append(img, words);
  el.append(figure);
  let url = null;
  function draw() {
    const data = model.get("data");
    const there = data && data.byteLength > 0;
    if (url) URL.revokeObjectURL(url);
    url = there ? URL.createObjectURL(new Blob([data], { type: model.get("type") })) : null;
    img.hidden = !there;
    if (there) img.onload = () => el.closest(".pli-panel")?.scrollIntoView({ block: "nearest" });
    if (there) img.src = url;
    else img.removeAttribute("src");
    img.alt = model.get("alt");
    words.textContent = model.get("caption");
    words.hidden = !model.get("caption");
    figure.hidden = !there && !model.get("caption");
  }
  for (const name of ["data", "alt", "caption"]) model.on(`change:${name}`, draw);
  draw();
  return () => url && URL.revokeObjectURL(url);
}
export default { render };
