"use strict";
// Draws the page's figures in its colours, and again in others when the reader changes them.
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const nodes = [...document.querySelectorAll(".plot")];

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  const themed = (layout) => {
    const line = colour("--line");
    const axis = { gridcolor: line, linecolor: line, zerolinecolor: colour("--soft") };
    return {
      ...layout,
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: colour("--ink"), family: getComputedStyle(document.body).fontFamily, size: 12 },
      xaxis: { ...layout.xaxis, ...axis },
      yaxis: { ...layout.yaxis, ...axis },
    };
  };

  const config = { displayModeBar: false, responsive: true };
  const draw = async () => {
    // one after the other: the page can be read while they are drawn
    for (const node of nodes) {
      const figure = figures[Number(node.dataset.figure)];
      await Plotly.react(node, figure.data, themed(figure.layout), config);
    }
  };
  const drawn = draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawn.then(draw));
})();
