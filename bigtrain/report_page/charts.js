"use strict";
// Draws the charts of the report as SVG. All charts share the horizontal axis, its zoom and the cursor.
(() => {
  const { runs, charts } = JSON.parse(document.getElementById("data").textContent);
  const view = { axis: "step", smoothing: 30, hidden: new Set(), zoom: null, domain: [0, 1] };
  const MARGIN = { left: 56, right: 14, top: 10, bottom: 24 };
  const DASHES = ["", "7 3", "2 3"]; // eight colours, then the same ones dashed

  // Numbers as text

  const SIZES = [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]];
  const trim = (text) => (text.includes(".") ? text.replace(/\.?0+($|e)/, "$1") : text);
  const count = (v) => {
    const [size, letter] = SIZES.find(([s]) => Math.abs(v) >= s) || [1, ""];
    return trim((v / size).toPrecision(4)) + letter;
  };
  const general = (v) => {
    const size = Math.abs(v);
    return v === 0 ? "0" : size >= 1e5 || size < 1e-3 ? trim(v.toExponential(2)) : trim(v.toPrecision(size < 1 ? 3 : 5));
  };
  const UNITS = {
    number: general,
    power: (v) => (v === 0 ? "0" : trim(v.toExponential(2))),
    count,
    percent: (v) => trim((100 * v).toPrecision(3)) + "%",
    seconds: (v) => (v !== 0 && Math.abs(v) < 1 ? trim((1000 * v).toPrecision(3)) + " ms" : trim(v.toPrecision(4)) + " s"),
    gib: (v) => trim(v.toPrecision(4)) + " GiB",
  };
  const HOURS = [[172800, 86400, "d"], [7200, 3600, "h"], [120, 60, "min"], [0, 1, "s"]];
  const writeX = (v) => {
    if (view.axis === "step") return Math.round(v).toLocaleString("en");
    if (view.axis === "tokens") return count(v);
    const [, size, letter] = HOURS.find(([least]) => view.domain[1] >= least);
    return trim((v / size).toFixed(2)) + " " + letter;
  };

  // Curves

  // Mean under a Gaussian that narrows towards the first point, so that the steep start of a loss is not flattened.
  function smoothed(y) {
    const sigma = (view.smoothing / 100) ** 2 * 0.06 * y.length;
    return y.map((value, i) => {
      const s = Math.min(sigma, i / 3);
      if (s < 0.3 || value === null) return value;
      let sum = 0, weights = 0;
      for (let j = Math.max(0, Math.floor(i - 3 * s)); j <= Math.min(y.length - 1, i + 3 * s); j++) {
        if (y[j] === null) continue;
        const w = Math.exp(-(((j - i) / s) ** 2) / 2);
        sum += w * y[j];
        weights += w;
      }
      return weights ? sum / weights : null;
    });
  }

  function columns(curve, y) {
    const kept = curve[view.axis].map((x, i) => i).filter((i) => curve[view.axis][i] !== null);
    return { x: kept.map((i) => curve[view.axis][i]), y: kept.map((i) => y[i]) };
  }

  function linesOf(chart) {
    const lines = [];
    runs.forEach((run, index) => {
      for (const key of chart.keys) {
        const curve = run.curves[key];
        if (!curve || view.hidden.has(index)) continue;
        const base = curve.mean || curve;
        const line = { index, dots: curve.dots, raw: columns(curve, curve.y), smooth: null };
        if (chart.smooth && !curve.dots && view.smoothing > 0 && base.y.length > 2) line.smooth = columns(base, smoothed(base.y));
        const what = chart.keys.length > 1 ? (curve.dots ? "validation" : "training") : "";
        line.name = runs.length === 1 ? what || chart.title : what ? run.name + " " + what : run.name;
        lines.push(line);
      }
    });
    return lines;
  }

  function domainOfX() {
    if (view.zoom) return view.zoom;
    let low = Infinity, high = -Infinity;
    runs.forEach((run, index) => {
      if (view.hidden.has(index)) return;
      for (const curve of Object.values(run.curves)) {
        for (const x of curve[view.axis]) {
          if (x !== null) [low, high] = [Math.min(low, x), Math.max(high, x)];
        }
      }
    });
    return low > high ? [0, 1] : low === high ? [low - 1, high + 1] : [low, high];
  }

  function nearest(xs, x) {
    let low = 0, high = xs.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (xs[middle] < x) low = middle; else high = middle;
    }
    return Math.abs(xs[low] - x) <= Math.abs(xs[high] - x) ? low : high;
  }

  // Scales

  function ticks(low, high, wanted) {
    const rough = (high - low) / wanted, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].find((m) => m * power >= rough * 0.999) * power;
    const found = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
    return found;
  }

  function logTicks(low, high) {
    const found = [], decades = Math.log10(high / low);
    const multiples = decades > 2.5 ? [1] : decades > 1 ? [1, 3] : [1, 1.5, 2, 3, 5, 7];
    const every = Math.max(1, Math.ceil(decades / 6));
    for (let p = Math.floor(Math.log10(low)); p <= Math.log10(high); p += every) {
      for (const m of multiples) if (m * 10 ** p >= low && m * 10 ** p <= high) found.push(m * 10 ** p);
    }
    return found.length > 1 ? found : ticks(low, high, 4);
  }

  function timeTicks(low, high, wanted) {
    const [, size] = HOURS.find(([least]) => high >= least);
    return ticks(low / size, high / size, wanted).map((t) => t * size);
  }

  function domainOfY(lines, chart, log, [left, right]) {
    const values = [];
    for (const { raw } of lines) {
      raw.y.forEach((y, i) => {
        if (y !== null && raw.x[i] >= left && raw.x[i] <= right && (!log || y > 0)) values.push(y);
      });
    }
    if (!values.length) return log ? [0.1, 1] : [0, 1];
    let low = values.reduce((a, b) => Math.min(a, b)), high = values.reduce((a, b) => Math.max(a, b));
    if (log) return low === high ? [low / 2, high * 2] : [low / (high / low) ** 0.04, high * (high / low) ** 0.04];
    if (chart.zero && low >= 0) low = 0;
    const pad = (high - low || Math.abs(high) || 1) * 0.05;
    return [low < 0 || low > pad ? low - pad : Math.min(0, low), high + pad];
  }

  // A few values far above the rest would flatten a linear axis.
  function wantsLog(chart) {
    const values = runs.flatMap((run) => chart.keys.flatMap((k) => run.curves[k]?.y ?? [])).filter((y) => y !== null).sort((a, b) => a - b);
    return !chart.zero && values.length > 2 && values[0] > 0 && values.at(-1) > 20 * values[values.length >> 1];
  }

  // SVG

  function svg(name, attributes, parent) {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    parent?.append(element);
    return element;
  }

  function html(name, className, text, parent) {
    const element = document.createElement(name);
    element.className = className;
    element.textContent = text;
    parent?.append(element);
    return element;
  }

  function chartKey() {
    return ["training", "validation"].flatMap((name) => {
      const picture = svg("svg", { viewBox: "0 0 26 8", width: 26, height: 8, "aria-hidden": true });
      svg("line", { class: name === "training" ? "curve" : "curve dotted", x1: 0, x2: 26, y1: 4, y2: 4 }, picture);
      if (name === "validation") svg("circle", { class: "dot", cx: 13, cy: 4, r: 3 }, picture);
      return [picture, name];
    });
  }

  const drawn = charts.map((chart, number) => {
    const figure = html("figure", "chart", "", document.getElementById("charts"));
    const caption = html("figcaption", "", "", figure);
    html("span", "", chart.title, caption);
    if (chart.keys.length > 1) html("span", "key", "", caption).append(...chartKey());
    const button = html("button", "log", "log", caption);
    button.ariaLabel = "Logarithmic vertical axis: " + chart.title;
    const picture = svg("svg", { role: "img", tabindex: 0 }, figure);
    const tip = html("div", "tip", "", figure);
    tip.hidden = true;
    const write = UNITS[chart.unit];
    let log = wantsLog(chart), lines = [], toX, toY, fromX, cursor, width, height;

    function draw() {
      width = Math.max(260, figure.clientWidth - 24);
      height = number === 0 ? Math.min(360, Math.max(240, width * 0.5)) : 210;
      lines = linesOf(chart);
      button.ariaPressed = log;
      picture.replaceChildren();
      picture.setAttribute("viewBox", `0 0 ${width} ${height}`);
      const [left, right, top, bottom] = [MARGIN.left, width - MARGIN.right, MARGIN.top, height - MARGIN.bottom];
      const x = view.domain, y = domainOfY(lines, chart, log, x);
      const scale = log ? Math.log : (v) => v;
      toX = (v) => left + ((v - x[0]) / (x[1] - x[0])) * (right - left);
      fromX = (p) => x[0] + ((p - left) / (right - left)) * (x[1] - x[0]);
      toY = (v) => bottom - ((scale(v) - scale(y[0])) / (scale(y[1]) - scale(y[0]))) * (bottom - top);
      for (const t of log ? logTicks(...y) : ticks(...y, 5)) {
        svg("line", { class: "grid", x1: left, x2: right, y1: toY(t), y2: toY(t) }, picture);
        svg("text", { x: left - 8, y: toY(t) + 4, "text-anchor": "end" }, picture).textContent = write(t);
      }
      svg("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }, picture);
      for (const t of (view.axis === "time" ? timeTicks : ticks)(...x, Math.max(3, width / 130))) {
        const anchor = toX(t) > right - 20 ? "end" : "middle";
        svg("text", { x: toX(t), y: bottom + 17, "text-anchor": anchor }, picture).textContent = writeX(t);
      }
      const clip = svg("clipPath", { id: "clip" + number }, picture);
      svg("rect", { x: left - 4, y: top - 4, width: right - left + 8, height: bottom - top + 8 }, clip);
      const inside = svg("g", { "clip-path": `url(#clip${number})` }, picture);
      for (const line of lines) drawLine(line, inside, bottom);
      cursor = svg("g", {}, picture);
      const ends = lines.map((l) => [l.name, l.raw.y.filter((v) => v !== null).at(-1)]).filter(([, v]) => v !== undefined);
      picture.setAttribute("aria-label", chart.title + ". Last values: " + ends.map(([name, v]) => name + " " + write(v)).join(", "));
    }

    function drawLine(line, parent, bottom) {
      const group = svg("g", { class: "colour-" + (line.index % 8) }, parent);
      const dash = DASHES[Math.floor(line.index / 8) % DASHES.length];
      const path = ({ x, y }, className) => {
        let d = "", pen = "M";
        for (let i = 0; i < x.length; i++) {
          if (y[i] === null || (log && y[i] <= 0)) { pen = "M"; continue; }
          d += pen + toX(x[i]).toFixed(1) + " " + toY(y[i]).toFixed(1);
          pen = "L";
        }
        const element = svg("path", { class: className, d }, group);
        if (dash && !line.dots) element.setAttribute("stroke-dasharray", dash);
      };
      const mixed = line.dots && chart.keys.length > 1;
      path(line.raw, "curve" + (line.smooth ? " raw" : mixed ? " dotted" : ""));
      if (line.smooth) path(line.smooth, "curve");
      const { x, y } = line.raw;
      x.forEach((_, i) => {
        if (y[i] === null) {
          const p = toX(x[i]);
          svg("path", { class: "broken", d: `M${p - 5} ${bottom}L${p + 5} ${bottom}L${p} ${bottom - 9}Z` }, group);
        } else if ((line.dots && x.length <= 60) || x.length === 1) {
          svg("circle", { class: "dot", cx: toX(x[i]), cy: toY(y[i]), r: 3 }, group);
        }
      });
    }

    function clear() {
      cursor?.replaceChildren();
      tip.hidden = true;
    }

    // The cursor at a value of the horizontal axis; the chart under the pointer also writes the values beside it.
    function point(at, withTip) {
      clear();
      const p = toX(at);
      if (p < MARGIN.left - 1 || p > width - MARGIN.right + 1) return;
      svg("line", { class: "cursor", x1: p, x2: p, y1: MARGIN.top, y2: height - MARGIN.bottom }, cursor);
      const table = document.createElement("table");
      for (const line of lines) {
        if (!line.raw.x.length || at > line.raw.x.at(-1) * 1.02 + 1) continue;
        const i = nearest(line.raw.x, at), value = line.raw.y[i];
        const front = line.smooth || line.raw, j = nearest(front.x, at), shown = front.y[j];
        if (shown !== null && (!log || shown > 0)) {
          svg("circle", { class: "at colour-" + (line.index % 8), cx: toX(front.x[j]), cy: toY(shown), r: 4 }, cursor);
        }
        const row = html("tr", "colour-" + (line.index % 8), "", table);
        html("td", "", line.name, row);
        html("td", "", line.dots ? "at " + writeX(line.raw.x[i]) : line.smooth && shown !== null ? "smoothed " + write(shown) : "", row);
        html("td", "", value === null ? "not finite" : write(value), row);
      }
      if (!withTip || !table.children.length) return;
      const what = { step: "step ", tokens: "tokens ", time: "" }[view.axis];
      tip.replaceChildren(html("div", "note", what + writeX(at)), table);
      tip.hidden = false;
      const outer = figure.getBoundingClientRect(), inner = picture.getBoundingClientRect();
      const beside = inner.left - outer.left + p * (inner.width / width);
      const left = p < width / 2 ? beside + 14 : beside - tip.offsetWidth - 14;
      tip.style.top = inner.top - outer.top + MARGIN.top + "px";
      tip.style.left = Math.max(4, Math.min(left, outer.width - tip.offsetWidth - 4)) + "px";
    }

    let start = null, box = null;
    const where = (event) => {
      const bounds = picture.getBoundingClientRect();
      return Math.min(width - MARGIN.right, Math.max(MARGIN.left, ((event.clientX - bounds.left) / bounds.width) * width));
    };
    picture.addEventListener("pointermove", (event) => {
      const p = where(event);
      pointAll(fromX(p), number);
      if (start !== null) {
        box ??= svg("rect", { class: "zoom", y: MARGIN.top, height: height - MARGIN.top - MARGIN.bottom }, picture);
        box.setAttribute("x", Math.min(start, p));
        box.setAttribute("width", Math.abs(p - start));
      }
    });
    picture.addEventListener("pointerleave", () => { if (start === null) clearAll(); });
    picture.addEventListener("blur", () => clearAll());
    picture.addEventListener("pointerdown", (event) => {
      if (event.pointerType !== "mouse") return;
      start = where(event);
      picture.setPointerCapture(event.pointerId);
    });
    picture.addEventListener("pointerup", (event) => {
      const [from, to] = [start, where(event)].sort((a, b) => a - b);
      box?.remove();
      if (start !== null && to - from > 8) zoom([fromX(from), fromX(to)]);
      start = box = null;
    });
    picture.addEventListener("dblclick", () => zoom(null));
    let keyed = null;
    picture.addEventListener("keydown", (event) => {
      const direction = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (event.key === "Escape") zoom(null);
      if (!direction) return;
      event.preventDefault();
      const [low, high] = view.domain;
      keyed = Math.min(high, Math.max(low, (keyed ?? (low + high) / 2) + (direction * (high - low)) / 100));
      pointAll(keyed, number);
    });
    button.addEventListener("click", () => { log = !log; draw(); });
    return { draw, point, clear };
  });

  function drawAll() {
    view.domain = domainOfX();
    drawn.forEach((chart) => chart.draw());
  }
  const clearAll = () => drawn.forEach((chart) => chart.clear());
  const pointAll = (at, active) => drawn.forEach((chart, number) => chart.point(at, number === active));

  // Controls

  const reset = document.getElementById("reset");
  function zoom(range) {
    view.zoom = range;
    reset.hidden = !range;
    clearAll();
    drawAll();
  }
  reset.addEventListener("click", () => zoom(null));
  const axes = document.querySelectorAll("#axis button");
  for (const button of axes) {
    button.addEventListener("click", () => {
      view.axis = button.dataset.axis;
      for (const other of axes) other.ariaPressed = other === button;
      zoom(null);
    });
  }
  document.getElementById("smoothing").addEventListener("input", (event) => {
    view.smoothing = Number(event.target.value);
    drawAll();
  });
  if (runs.length > 1) {
    runs.forEach((run, index) => {
      const button = html("button", "colour-" + (index % 8), run.name, document.getElementById("legend"));
      button.ariaPressed = true;
      button.addEventListener("click", () => {
        if (!view.hidden.delete(index)) view.hidden.add(index);
        button.ariaPressed = !view.hidden.has(index);
        drawAll();
      });
    });
  }
  let frame = null;
  new ResizeObserver(() => {
    cancelAnimationFrame(frame);
    frame = requestAnimationFrame(drawAll);
  }).observe(document.getElementById("charts"));
  drawAll();
})();
