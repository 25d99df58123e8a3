// A page of pictures: results of a search, or the gallery itself. Python sends what a cell says; pictures are asked for when they come into sight.
// Everything that comes from a file or a person goes through textContent, alt and title, never through HTML.

const KEYS = { y: ["mark", "right"], n: ["mark", "wrong"], u: ["mark", ""], e: ["explain"], l: ["look"], "[": ["back"], "]": ["forward"] };
const KEPT = 2000; // small pictures that are remembered

function make(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

function button(className, text, label, action) {
  const node = make("button", className, text);
  node.type = "button";
  node.title = label;
  node.setAttribute("aria-label", label);
  node.addEventListener("click", (event) => { event.stopPropagation(); action(); });
  return node;
}

function render({ model, el }) {
  const urls = new Map(); // picture -> address of its small picture in memory
  const asked = new Set();
  const nodes = new Map(); // picture -> its cell
  let wanted = new Set(), timer = null, current = null;

  const root = make("section", "pli-grid");
  root.setAttribute("data-lm-suppress-shortcuts", "true"); // JupyterLab's own keys rest here
  const head = make("div", "pli-grid-head");
  const title = make("h2", "pli-grid-title");
  const said = make("p", "pli-grid-said");
  said.setAttribute("role", "status");
  const list = make("ol", "pli-cells");
  const pager = make("nav", "pli-pager");
  pager.setAttribute("aria-label", "Pages");
  const first = button("pli-button", "Previous", "Previous page", () => turn(model.get("page") - 1));
  const next = button("pli-button", "Next", "Next page", () => turn(model.get("page") + 1));
  const where = make("label", "pli-page", "Page ");
  const number = make("input");
  number.type = "number";
  number.min = 1;
  const of = make("span");
  where.append(number, of);
  number.addEventListener("change", () => turn(Number(number.value) - 1));
  pager.append(first, where, next);
  const help = make("p", "pli-help");
  head.append(title, said);
  root.append(head, list, pager, help);
  el.append(root);

  const send = (action, id, value) => model.send({ kind: "event", action, id, value: value ?? null });
  function turn(page) {
    const last = Math.max(0, model.get("pages") - 1);
    page = Math.min(Math.max(0, Math.trunc(page) || 0), last);
    number.value = page + 1;
    if (page === model.get("page")) return;
    send("page", null, page);
    if (root.getBoundingClientRect().top < 0) root.scrollIntoView({ block: "start" });
  }

  // small pictures: asked for together, and only those that can be seen
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      const id = Number(entry.target.dataset.id);
      if (!urls.has(id) && !asked.has(id)) wanted.add(id);
    }
    if (wanted.size && timer === null) timer = setTimeout(ask, 20);
  }, { rootMargin: "300px" });
  function ask() {
    timer = null;
    const ids = [...wanted];
    wanted = new Set();
    for (const id of ids) asked.add(id);
    for (let start = 0; start < ids.length; start += 16) model.send({ kind: "thumbnails", ids: ids.slice(start, start + 16) });
  }
  // a page that has lost its Python says so, instead of doing nothing when it is used
  let heard = Date.now();
  const beat = setInterval(() => {
    model.send({ kind: "ping" });
    if (Date.now() - heard > 75000) said.textContent = "This page gets no answer any more. Is pli studio still running? Start it again, and open the address that it prints.";
  }, 15000);

  // marks that lie nowhere else: the page of its own asks before it is left (index.html.j2)
  const unsaved = () => { root.dataset.unsaved = model.get("unsaved"); };

  function onMessage(message, buffers) {
    heard = Date.now();
    if (message.kind !== "thumbnails") return;
    message.ids.forEach((id, at) => {
      asked.delete(id);
      const data = buffers[at];
      if (!data || data.byteLength === 0) return nodes.get(id)?.classList.add("pli-missing");
      urls.set(id, URL.createObjectURL(new Blob([data], { type: "image/jpeg" })));
      show(id);
    });
    while (urls.size > KEPT) {
      const oldest = [...urls.keys()].find((id) => !nodes.has(id));
      if (oldest === undefined) break;
      URL.revokeObjectURL(urls.get(oldest));
      urls.delete(oldest);
    }
  }
  function show(id) {
    const img = nodes.get(id)?.querySelector("img");
    if (img && urls.has(id) && img.src !== urls.get(id)) img.src = urls.get(id);
  }

  function cell(id) {
    const item = make("li", "pli-cell");
    item.dataset.id = id;
    const pick = make("button", "pli-pick");
    pick.type = "button";
    pick.addEventListener("click", () => { focusOn(id); send("choose", id); });
    pick.addEventListener("focus", () => { current = id; rove(); });
    const frame = make("span", "pli-frame");
    const img = make("img");
    img.decoding = "async";
    img.draggable = false;
    const rank = make("span", "pli-rank"), moved = make("span", "pli-moved"), mark = make("span", "pli-mark");
    frame.append(img, rank, moved, mark);
    pick.append(frame, make("span", "pli-name"));
    const actions = make("div", "pli-actions");
    const acts = [
      button("pli-act pli-yes", "✓", "Mark as right (y)", () => send("mark", id, item.dataset.mark === "right" ? "" : "right")),
      button("pli-act pli-no", "✗", "Mark as wrong (n)", () => send("mark", id, item.dataset.mark === "wrong" ? "" : "wrong")),
      button("pli-act pli-why", "why?", "Why is this a hit? (e)", () => send("explain", id)),
      button("pli-act pli-look", "look", "Look at it larger (l)", () => send("look", id)),
    ];
    for (const act of acts) act.tabIndex = -1; // by keyboard: the letters
    actions.append(...acts);
    item.append(pick, actions);
    nodes.set(id, item);
    watcher.observe(item);
    return item;
  }

  function fill(item, data, results) {
    const moved = data.moved ? data.moved.split(" ") : [];
    item.dataset.mark = data.mark;
    item.dataset.moved = moved[0] ?? "";
    item.querySelector("img").alt = "";
    const words = data.moved === "new" ? ", not among the first before" : data.moved ? `, moved ${data.moved}` : "";
    const pick = item.querySelector(".pli-pick");
    pick.setAttribute("aria-label", `${data.alt}${words}. Search with this picture`);
    pick.title = results ? `${data.path}\nscore ${data.score}` : data.path;
    item.querySelector("img").alt = data.alt;
    item.querySelector(".pli-rank").textContent = data.rank || "";
    item.querySelector(".pli-moved").textContent = moved[0] === "up" ? `▲ ${moved[1]}` : moved[0] === "down" ? `▼ ${moved[1]}` : moved[0] === "new" ? "new" : "";
    item.querySelector(".pli-mark").textContent = { right: "✓ right", wrong: "✗ wrong" }[data.mark] ?? "";
    item.querySelector(".pli-name").textContent = data.name;
    item.querySelector(".pli-yes").setAttribute("aria-pressed", data.mark === "right");
    item.querySelector(".pli-no").setAttribute("aria-pressed", data.mark === "wrong");
    item.querySelector(".pli-actions").classList.toggle("pli-few", !results);
  }

  function draw() {
    const cells = model.get("cells"), results = model.get("results"), had = root.contains(document.activeElement) && document.activeElement.classList.contains("pli-pick");
    const at = [...list.children].findIndex((item) => Number(item.dataset.id) === current);
    const places = new Map([...list.children].map((item) => [item.dataset.id, item.getBoundingClientRect()]));
    const ids = cells.map((data) => data.id);
    for (const [id, item] of nodes) if (!ids.includes(id)) { watcher.unobserve(item); item.remove(); nodes.delete(id); }
    cells.forEach((data, place) => {
      const item = nodes.get(data.id) ?? cell(data.id);
      fill(item, data, results);
      show(data.id);
      if (list.children[place] !== item) list.insertBefore(item, list.children[place] ?? null);
    });
    if (!ids.includes(current)) current = ids[Math.min(Math.max(at, 0), ids.length - 1)] ?? null;
    rove();
    if (had && current !== null) nodes.get(current)?.querySelector(".pli-pick").focus({ preventScroll: true });
    if (results && !matchMedia("(prefers-reduced-motion: reduce)").matches) {
      for (const item of list.children) { // pictures glide to their new places
        const old = places.get(item.dataset.id), now = item.getBoundingClientRect();
        if (!old || (old.left === now.left && old.top === now.top)) continue;
        item.animate([{ transform: `translate(${old.left - now.left}px, ${old.top - now.top}px)` }, { transform: "none" }], { duration: 250, easing: "ease-out" });
      }
    }
    words();
  }
  function words() {
    const page = model.get("page"), pages = model.get("pages");
    title.textContent = model.get("title");
    said.textContent = model.get("said");
    help.textContent = model.get("help");
    help.hidden = !model.get("help");
    number.value = page + 1;
    number.max = Math.max(1, pages);
    of.textContent = ` of ${pages.toLocaleString("en")}`;
    first.disabled = page <= 0;
    next.disabled = page >= pages - 1;
    pager.hidden = pages < 2;
    list.setAttribute("aria-label", model.get("title"));
    root.classList.toggle("pli-busy", model.get("busy"));
    root.setAttribute("aria-busy", model.get("busy"));
  }

  // one stop for the Tab key, arrows inside
  function rove() {
    for (const [id, item] of nodes) item.querySelector(".pli-pick").tabIndex = id === current ? 0 : -1;
  }
  function focusOn(id) {
    current = id;
    rove();
    nodes.get(id)?.querySelector(".pli-pick").focus();
  }
  root.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target === number) return;
    const items = [...list.children], at = items.findIndex((item) => Number(item.dataset.id) === current);
    if (at < 0) return;
    const across = items.filter((item) => item.offsetTop === items[0].offsetTop).length;
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: across, ArrowUp: -across, Home: -at, End: items.length - 1 - at }[event.key];
    if (step !== undefined) {
      const to = at + step;
      if (to >= 0 && to < items.length) focusOn(Number(items[to].dataset.id));
    } else if (event.key === "PageDown") turn(model.get("page") + 1);
    else if (event.key === "PageUp") turn(model.get("page") - 1);
    else if (KEYS[event.key]) {
      const [action, value] = KEYS[event.key];
      if (action === "mark" || action === "explain") { if (!model.get("results")) return; }
      send(action, current, value);
    } else return;
    event.preventDefault();
    event.stopPropagation();
  });

  model.on("change:cells", draw);
  for (const name of ["title", "said", "page", "pages", "busy", "help", "results"]) model.on(`change:${name}`, words);
  model.on("change:unsaved", unsaved);
  model.on("msg:custom", onMessage);
  unsaved();
  draw();
  return () => {
    watcher.disconnect();
    clearInterval(beat);
    model.off("change:cells", draw);
    model.off("msg:custom", onMessage);
    for (const url of urls.values()) URL.revokeObjectURL(url);
  };
}
export default { render };
