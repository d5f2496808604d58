(() => {
  "use strict";

  // what report/figure.py left beside each place: traces and a layout
  const family = getComputedStyle(document.body).fontFamily;
  const config = (filename) => ({
    responsive: true,
    displaylogo: false,
    modeBarButtons: [["toImage"]],
    toImageButtonOptions: { filename, scale: 2 },
  });
  for (const target of document.querySelectorAll("[data-figure]")) {
    const { data, layout } = JSON.parse(document.getElementById(`${target.id}-figure`).textContent);
    layout.font.family = family;
    layout.hoverlabel.font.family = family;
    if (layout.height) target.style.height = `${layout.height}px`; // a resize takes it from here
    Plotly.newPlot(target, data, layout, config(target.id));
  }
  // on paper the page is about 1100 wide (style.css zooms it), whatever the window was
  const plots = () => [...document.querySelectorAll("[data-figure]")].filter((p) => p.clientWidth);
  window.addEventListener("beforeprint", () => plots().forEach((plot) => {
    Plotly.relayout(plot, { width: plot.closest(".wide") ? 1060 : 520 });
  }));
  window.addEventListener("afterprint", () => plots().forEach((plot) => {
    Plotly.relayout(plot, { width: null, autosize: true });
  }));
})();
