// stands where MathJax would: no formula is shown on this page, and whatever Jupyter asks of it is answered with itself
const nothing = new Proxy(() => nothing, { get: (_, name) => (name === "then" ? undefined : nothing) });
window.MathJax = nothing;
