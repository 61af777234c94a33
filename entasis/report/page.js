// Draws the charts of the page with the inlined Vega, follows light and dark, switches tabs. Asks no network.
(() => {
  const data = JSON.parse(document.getElementById("datasets").textContent);
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const root = document.documentElement;
  const preferred = window.matchMedia("(prefers-color-scheme: dark)");
  const dark = () => (root.dataset.theme || (preferred.matches ? "dark" : "light")) === "dark";
  const colour = (name) => getComputedStyle(root).getPropertyValue(name).trim();

  const look = () => ({
    background: "transparent",
    font: "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif",
    axis: {
      labelColor: colour("--quiet"), titleColor: colour("--ink"), domainColor: colour("--rule"),
      tickColor: colour("--rule"), gridColor: colour("--rule"), gridOpacity: 0.55,
    },
    legend: { labelColor: colour("--ink"), titleColor: colour("--quiet") },
    header: { labelColor: colour("--ink"), titleColor: colour("--quiet") },
    title: { color: colour("--ink"), subtitleColor: colour("--quiet") },
    view: { stroke: null },
    rule: { color: colour("--quiet") },
    text: { color: colour("--ink") },
    style: { ink: { fill: colour("--ink"), stroke: colour("--ink") } },
  });

  const merge = (under, over) => {
    const result = { ...under };
    for (const [key, value] of Object.entries(over || {})) {
      const both = value && result[key] && typeof value === "object" && !Array.isArray(value);
      result[key] = both ? merge(result[key], value) : value;
    }
    return result;
  };

  // The names that are pressed in a chart's legend; none pressed is all.
  const bringForward = (place) => {
    const legend = document.querySelector(`.legend[data-for="${place.id}"]`);
    if (!legend || !place.view) return;
    const pressed = [...legend.querySelectorAll('[aria-pressed="true"]')].map((b) => b.dataset.name);
    place.view.signal("chosen", pressed).runAsync();
  };
  for (const button of document.querySelectorAll(".legend button")) {
    button.addEventListener("click", () => {
      button.setAttribute("aria-pressed", button.getAttribute("aria-pressed") !== "true");
      bringForward(document.getElementById(button.parentElement.dataset.for));
    });
  }

  const draw = async (place) => {
    const spec = structuredClone(charts[place.dataset.chart]);
    spec.datasets = Object.fromEntries(place.dataset.uses.split(" ").filter(Boolean).map((k) => [k, data[k]]));
    spec.config = merge(spec.config, look());
    try {
      const shown = await vegaEmbed(place, spec, { actions: false, renderer: "svg", ast: true });
      place.view = shown.view;
      bringForward(place);
      place.dataset.drawn = "yes";
    } catch (error) {
      place.textContent = "This chart could not be drawn: " + error.message;
      place.dataset.drawn = "failed";
    }
  };
  const drawAll = () => Promise.all([...document.querySelectorAll(".chart:not([hidden])")].map(draw));

  for (const tabs of document.querySelectorAll(".tabs")) {
    const buttons = [...tabs.querySelectorAll("button")];
    for (const button of buttons) {
      button.addEventListener("click", () => {
        for (const other of buttons) {
          const on = other === button;
          other.setAttribute("aria-selected", on);
          const place = document.getElementById(other.getAttribute("aria-controls"));
          place.hidden = !on;
          if (on) draw(place);
        }
      });
    }
  }

  const toggle = document.getElementById("theme");
  toggle.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    drawAll();
  });
  preferred.addEventListener("change", drawAll);
  // A page may be asked to open in one theme: report.html#dark
  if (/^#(dark|light)$/.test(location.hash)) root.dataset.theme = location.hash.slice(1);
  drawAll().then(() => { root.dataset.ready = "yes"; });
})();
