"use strict";
// Draws the charts, sorts tables and lists, and fits the charts to paper. The page can be read without it.

const PRINT_WIDTH_PX = 660; // A4 and Letter, less their margins
const NARROW_PX = 500;
const LEGEND_ROW_PX = 22;

async function loadPlotly() {
  const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent.trim()), (c) => c.charCodeAt(0));
  const unpacked = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(unpacked).text();
  document.head.append(script);
}

async function drawCharts() {
  const places = [...document.querySelectorAll("[data-chart]")];
  if (!places.length) return;
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const hasMouse = window.matchMedia("(pointer: fine)").matches;
  await loadPlotly();
  for (const place of places) {
    const figure = figures[place.dataset.chart];
    figure.layout.dragmode = hasMouse ? "zoom" : false;
    makeRoomForLegend(place, figure);
    await Plotly.newPlot(place, figure.data, figure.layout, {
      responsive: true,
      displaylogo: false,
      displayModeBar: hasMouse ? "hover" : false,
      modeBarButtonsToRemove: ["select2d", "lasso2d", "pan2d", "zoomIn2d", "zoomOut2d"],
    });
    place.dataset.drawn = "yes";
  }
  window.addEventListener("beforeprint", () => {
    for (const place of places) Plotly.relayout(place, { width: PRINT_WIDTH_PX, autosize: false });
  });
  window.addEventListener("afterprint", () => {
    for (const place of places) Plotly.relayout(place, { width: null, autosize: true });
  });
}

// On a narrow screen a legend is a list, in two columns; the chart keeps its own height under it.
function makeRoomForLegend(place, { data, layout }) {
  if (place.clientWidth > NARROW_PX || data.length < 3 || layout.showlegend === false) return;
  layout.height += LEGEND_ROW_PX * Math.ceil(data.length / 2);
  Object.assign(layout.legend, { entrywidth: 0.5, entrywidthmode: "fraction", maxheight: layout.height });
  place.style.height = `${layout.height}px`;
}

// Numbers by size, all else by the alphabet; what is empty comes last in either direction.
function compare(one, other, direction) {
  const isNothing = (text) => text === "" || text === "–";
  if (isNothing(one) || isNothing(other)) return isNothing(one) - isNothing(other);
  const [left, right] = [one, other].map((text) => Number(text.replace(/[,\s\u202f%]|±.*$/g, "")));
  const order = Number.isNaN(left) || Number.isNaN(right) ? one.localeCompare(other, undefined, { numeric: true }) : left - right;
  return order * direction;
}

function sortable(table) {
  const body = table.tBodies[0];
  if (body.rows.length < 2) return;
  [...table.tHead.rows[0].cells].forEach((header, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    header.append(button);
    button.addEventListener("click", () => {
      const direction = header.ariaSort === "ascending" ? -1 : 1;
      for (const cell of header.parentElement.cells) cell.removeAttribute("aria-sort");
      header.setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
      const text = (row) => row.cells[column].textContent.trim();
      body.append(...[...body.rows].sort((a, b) => compare(text(a), text(b), direction)));
    });
  });
}

function sortableList(toolbar) {
  const list = document.getElementById(toolbar.dataset.sorts);
  const buttons = [...toolbar.querySelectorAll("button")];
  toolbar.hidden = false;
  for (const button of buttons) {
    button.addEventListener("click", () => {
      const isAgain = button.getAttribute("aria-pressed") === "true";
      const direction = isAgain ? -Number(button.dataset.direction) : Number(button.dataset.first);
      for (const other of buttons) {
        other.setAttribute("aria-pressed", "false");
        delete other.dataset.direction;
      }
      button.setAttribute("aria-pressed", "true");
      button.dataset.direction = direction;
      const key = button.dataset.key;
      list.append(...[...list.children].sort((a, b) => compare(a.dataset[key], b.dataset[key], direction)));
    });
  }
}

// One player at a time.
document.addEventListener("play", (event) => {
  for (const player of document.querySelectorAll("audio")) if (player !== event.target) player.pause();
}, true);

document.querySelectorAll("table.sortable").forEach(sortable);
document.querySelectorAll("[data-sorts]").forEach(sortableList);
drawCharts()
  .then(() => { document.documentElement.dataset.ready = "yes"; })
  .catch((problem) => {
    document.documentElement.dataset.ready = "no";
    document.getElementById("no-charts").hidden = false;
    throw problem;
  });
