// A text to take along, with a button that copies it.
function render({ model, el }) {
  const box = document.createElement("div");
  box.className = "pli-copy";
  const head = document.createElement("div");
  head.className = "pli-copy-head";
  const name = document.createElement("span");
  const copy = document.createElement("button");
  copy.type = "button";
  copy.className = "pli-button";
  const text = document.createElement("pre");
  text.tabIndex = 0;
  head.append(name, copy);
  box.append(head, text);
  el.append(box);
  copy.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(model.get("text"));
      copy.textContent = "Copied";
    } catch (error) { // no clipboard here: select it, so that Ctrl+C does
      getSelection().selectAllChildren(text);
      copy.textContent = "Selected: press Ctrl+C";
    }
    setTimeout(draw, 1500);
  });
  function draw() {
    name.textContent = model.get("name");
    copy.textContent = "Copy";
    copy.setAttribute("aria-label", `Copy: ${model.get("name")}`);
    text.textContent = model.get("text");
    text.setAttribute("aria-label", model.get("name"));
    box.hidden = !model.get("text");
  }
  for (const each of ["text", "name"]) model.on(`change:${each}`, draw);
  draw();
}
export default { render };
