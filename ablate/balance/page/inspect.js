"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const depth = Math.round(Math.log2(data.counts[0][0][0].length));
  const svgNode = (name, attributes, parent) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    parent.appendChild(node);
    return node;
  };
  const percent = (share) => (100 * share).toFixed(share < 0.1 ? 1 : 0) + "%";
  const clear = (svg) => { while (svg.childNodes.length > 1) svg.removeChild(svg.lastChild); };

  const fill = (select, from, to, chosen) => {
    for (let i = from; i <= to; i++) {
      const option = document.createElement("option");
      option.value = option.textContent = String(i);
      option.selected = i === chosen;
      select.appendChild(option);
    }
  };
  fill(byId("layer"), 0, data.counts[0].length - 1, 0);
  fill(byId("tree"), 0, data.counts[0][0].length - 1, 0);
  fill(byId("levels"), Math.min(1, depth), depth, Math.min(depth, 8));
  byId("step").max = data.steps.length - 1;
  byId("step").value = data.steps.length - 1;

  const levelsOf = (leaves) => {
    const levels = [leaves];
    while (levels[0].length > 1) {
      const below = levels[0];
      levels.unshift(Array.from({ length: below.length / 2 }, (_, i) => below[2 * i] + below[2 * i + 1]));
    }
    return levels;
  };
  const colour = (skew) => {
    if (skew === null) return "var(--paper)";
    const strength = Math.round(100 * Math.min(1, Math.abs(skew) * 1.5));
    return `color-mix(in srgb, var(${skew > 0 ? "--right" : "--left"}) ${strength}%, var(--none))`;
  };
  const say = (text) => { byId("hovered").textContent = text; };

  const draw = () => {
    const layer = Number(byId("layer").value), tree = Number(byId("tree").value), at = Number(byId("step").value);
    const shown = Number(byId("levels").value);
    const leaves = data.counts[at][layer][tree], skew = data.skew[at][layer][tree];
    const levels = levelsOf(leaves), total = levels[0][0], svg = byId("drawing");
    const width = Math.max(360, svg.clientWidth || 1000), row = Math.max(36, Math.min(72, 400 / Math.max(1, shown))), top = 24, bars = 90;
    const bottom = top + shown * row, height = bottom + bars + 30;
    clear(svg);
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    byId("drawing-title").textContent = `Layer ${layer}, tree ${tree}, step ${data.steps[at]}`;
    const x = (level, i) => (width * (i + 0.5)) / 2 ** level, y = (level) => top + level * row;
    const widest = Math.min(34, width / 4);
    for (let level = 1; level <= shown; level++) {
      levels[level].forEach((count, i) => {
        const share = count / total, x0 = x(level - 1, i >> 1), x1 = x(level, i), y0 = y(level - 1), y1 = y(level);
        const path = svgNode("path", {
          d: `M${x0} ${y0}C${x0} ${(y0 + y1) / 2} ${x1} ${(y0 + y1) / 2} ${x1} ${y1}`,
          class: count ? "edge" : "edge unused",
          "stroke-width": count ? Math.max(0.4, share * widest) : 1,
        }, svg);
        svgNode("title", {}, path).textContent = `${percent(share)} of ${total} tokens`;
      });
    }
    for (let level = 0; level <= shown; level++) {
      levels[level].forEach((count, i) => {
        const value = level < depth ? skew[2 ** level - 1 + i] : null;
        const radius = Math.max(1.5, Math.min(7, 0.3 * width / 2 ** level));
        const node = svgNode("circle", { cx: x(level, i), cy: y(level), r: radius, class: !count ? "node unused" : level < depth && value === null ? "node unknown" : "node" }, svg);
        if (count) node.style.fill = level < depth ? colour(value) : "var(--edge)";
        const what = level < depth ? `node ${2 ** level - 1 + i}` : `leaf ${i}`;
        const about = `${what}: ${count} tokens, ${percent(count / total)}` +
          (level < depth ? (value === null ? ", skew unknown" : `, skew ${value.toFixed(2)}`) : "");
        svgNode("title", {}, node).textContent = about;
        node.addEventListener("pointerenter", () => say(about));
      });
    }
    const groups = levels[shown], most = Math.max(...groups, total / groups.length * 2), base = bottom + bars + 8;
    groups.forEach((count, i) => {
      const tall = (bars - 12) * count / most;
      const bar = svgNode("rect", { x: x(shown, i) - 0.4 * width / groups.length, y: base - tall, width: 0.8 * width / groups.length, height: tall, class: "bar" }, svg);
      svgNode("title", {}, bar).textContent = percent(count / total);
    });
    const equal = base - (bars - 12) * (total / groups.length) / most;
    svgNode("line", { x1: 0, x2: width, y1: equal, y2: equal, class: "equal" }, svg);
    byId("n-eff").textContent = `${(data.n_eff_frac[at][layer][tree] * leaves.length).toFixed(1)} of ${leaves.length}`;
    byId("dead").textContent = percent(data.dead_frac[at][layer][tree]);
    byId("max-load").textContent = (data.max_vio[at][layer][tree] + 1).toFixed(1);
    byId("step-value").textContent = data.steps[at];
    course(layer, tree, at);
  };

  const course = (layer, tree, at) => {
    const svg = byId("course"), width = Math.max(360, byId("course").clientWidth || 1000), height = 180, left = 40, base = 150;
    clear(svg);
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const last = data.steps[data.steps.length - 1] || 1;
    const x = (i) => left + (width - left - 10) * data.steps[i] / last, y = (value) => base - (base - 10) * value;
    for (const value of [0, 0.5, 1]) {
      svgNode("line", { x1: left, x2: width - 10, y1: y(value), y2: y(value), class: "axis", opacity: value ? 0.3 : 1 }, svg);
      svgNode("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, svg).textContent = value;
    }
    svgNode("text", { x: left, y: height - 8 }, svg).textContent = "step 0";
    svgNode("text", { x: width - 10, y: height - 8, "text-anchor": "end" }, svg).textContent = `step ${last}`;
    const line = (k, kind) => svgNode("polyline", { points: data.steps.map((_, i) => `${x(i)},${y(data.n_eff_frac[i][layer][k])}`).join(" "), class: kind }, svg);
    data.counts[0][0].forEach((_, k) => { if (k !== tree) line(k, "other"); });
    line(tree, "this");
    svgNode("circle", { cx: x(at), cy: y(data.n_eff_frac[at][layer][tree]), r: 5, class: "now" }, svg);
  };

  let timer = null;
  const stop = () => {
    clearInterval(timer);
    timer = null;
    byId("play").textContent = "Play";
    byId("play").setAttribute("aria-pressed", "false");
  };
  byId("play").addEventListener("click", () => {
    if (timer !== null) return stop();
    const slider = byId("step");
    if (slider.value === slider.max) slider.value = 0;
    byId("play").textContent = "Stop";
    byId("play").setAttribute("aria-pressed", "true");
    timer = setInterval(() => {
      if (slider.value === slider.max) return stop();
      slider.value = Number(slider.value) + 1;
      draw();
    }, 600);
    draw();
  });
  for (const id of ["layer", "tree", "levels", "step"]) byId(id).addEventListener("input", draw);
  window.addEventListener("resize", draw);
  document.querySelector("form").addEventListener("submit", (event) => event.preventDefault());
  draw();
})();
