// A file goes to Python in pieces: a socket takes messages of at most 10 MiB and drops larger ones without a word.
const PIECE = 1 << 20;

function render({ model, el }) {
  const zone = document.createElement("div");
  zone.className = "pli-upload";
  const label = document.createElement("label");
  label.className = "pli-button";
  label.textContent = "Use a picture of your own";
  const input = document.createElement("input");
  input.type = "file";
  input.accept = "image/*";
  input.className = "pli-file";
  label.append(input);
  const hint = document.createElement("span");
  hint.className = "pli-hint";
  hint.textContent = "or drop one here, or paste it";
  const bar = document.createElement("progress");
  bar.hidden = true;
  bar.setAttribute("aria-label", "Sending the picture");
  zone.append(label, hint, bar);
  el.append(zone);

  let turn = 0, waiting = null;
  const taken = (message) => { if (message.kind === "taken" && waiting) { const go = waiting; waiting = null; go(); } };
  model.on("msg:custom", taken);

  async function send(file) {
    const mine = ++turn, name = file.name || "picture";
    if (file.size > model.get("most")) return model.send({ kind: "too large", name });
    bar.hidden = false;
    bar.max = Math.max(1, file.size);
    bar.value = 0;
    try {
      for (let start = 0; start === 0 || start < file.size; start += PIECE) {
        const piece = await file.slice(start, start + PIECE).arrayBuffer();
        if (mine !== turn) return; // another file was chosen meanwhile
        const answer = new Promise((go, stop) => { waiting = go; setTimeout(stop, 60000); });
        model.send({ kind: "piece", turn: mine, name, first: start === 0, last: start + PIECE >= file.size }, undefined, [piece]);
        await answer;
        bar.value = start + piece.byteLength;
      }
    } catch (error) {
      hint.textContent = "That file could not be read or sent. Is it still there, and pli studio still running?";
      model.send({ kind: "unreadable", name });
    } finally {
      if (mine === turn) bar.hidden = true;
      input.value = "";
    }
  }

  input.addEventListener("change", () => input.files.length && send(input.files[0]));
  // the whole page takes what is dropped or pasted, once this is part of it; in a notebook, its own widget only
  const over = (event) => { if (event.dataTransfer?.types.includes("Files")) { event.preventDefault(); zone.classList.add("pli-over"); } };
  const leave = () => zone.classList.remove("pli-over");
  const drop = (event) => {
    leave();
    if (!event.dataTransfer?.files.length) return;
    event.preventDefault();
    event.stopPropagation();
    send(event.dataTransfer.files[0]);
  };
  const paste = (event) => {
    const file = [...(event.clipboardData?.files ?? [])].find((each) => each.type.startsWith("image/"));
    if (file) { event.preventDefault(); send(file); }
  };
  const heard = [["dragover", over], ["dragleave", leave], ["drop", drop], ["paste", paste]];
  let root = null, tries = 0;
  const attach = () => {
    root = el.closest(".pli-studio") && (document.body?.dataset.voila ? document : el.closest(".pli-studio"));
    if (root) for (const [name, what] of heard) root.addEventListener(name, what);
    else if (tries++ < 200) setTimeout(attach, 50);
  };
  attach();
  return () => {
    model.off("msg:custom", taken);
    tries = Infinity;
    if (root) for (const [name, what] of heard) root.removeEventListener(name, what);
  };
}
export default { render };
