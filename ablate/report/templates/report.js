"use strict";
(() => {
  const root = document.documentElement;
  const data = JSON.parse(document.getElementById("data").textContent);
  root.classList.add("js");
  const css = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const el = (tag, attributes = {}, ...children) => {
    const node = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) {
      if (key === "text") node.textContent = value;
      else node.setAttribute(key, value);
    }
    node.append(...children);
    return node;
  };
  // Colours are named by CSS variable, so that a figure follows the theme.
  const paint = (value) => {
    if (typeof value === "string") {
      const match = /^var\((--[a-z0-9]+)\)$/.exec(value);
      return match ? css(match[1]) : value;
    }
    if (Array.isArray(value)) return value.map(paint);
    if (value && typeof value === "object")
      return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, paint(v)]));
    return value;
  };
  const coarse = matchMedia("(pointer: coarse)").matches;
  const axis = () => ({
    gridcolor: css("--grid"), zerolinecolor: css("--line"), linecolor: css("--line"), tickcolor: css("--line"),
    automargin: true, title: { font: { size: 13 } },
  });
  const merge = (a, b) => {
    const out = { ...a };
    for (const [k, v] of Object.entries(b || {}))
      out[k] = v && typeof v === "object" && !Array.isArray(v) ? merge(out[k] || {}, v) : v;
    return out;
  };
  const plot = (node, spec) => {
    const narrow = node.clientWidth < 560;
    const base = {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", autosize: true, dragmode: coarse ? false : "zoom",
      font: { family: "system-ui, sans-serif", size: 12, color: css("--ink") }, margin: { l: 60, r: 16, t: 16, b: 50 },
      hoverlabel: { bgcolor: css("--soft"), bordercolor: css("--line"), font: { color: css("--ink") } },
      legend: { orientation: "h", y: narrow ? -0.3 : -0.16, yanchor: "top", font: { size: narrow ? 10 : 11 } },
      xaxis: axis(), yaxis: axis(),
    };
    const layout = merge(base, paint(spec.layout));
    return Plotly.react(node, paint(spec.data), layout, { responsive: true, displayModeBar: false });
  };

  // Plots are drawn when they come near the window.
  const drawn = new Map();
  const later = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      later.unobserve(entry.target);
      const draw = drawn.get(entry.target);
      draw();
    }
  }, { rootMargin: "300px" });
  const seen = new Set();
  const whenNear = (node, draw) => {
    drawn.set(node, () => { seen.add(node); draw(); });
    later.observe(node);
  };
  const redraw = () => { for (const node of seen) drawn.get(node)(); };

  for (const node of document.querySelectorAll(".plot[data-plot]")) {
    const spec = data.plots[node.dataset.plot], figure = node.closest("figure");
    // Until then, and on paper, its picture is there.
    whenNear(figure, () => { figure.classList.add("live"); plot(node, spec); });
  }

  const theme = document.getElementById("theme");
  theme.addEventListener("click", () => {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    theme.textContent = dark ? "Dark" : "Light";
    theme.setAttribute("aria-label", dark ? "Use dark colours" : "Use light colours");
    redraw();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);

  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const select = (label, names) => {
    const box = el("select");
    names.forEach((name, i) => box.append(el("option", { value: String(i), text: name })));
    return [el("label", { text: label + " " }, box), box];
  };
  const mix = (a, b, t) => a.map((v, i) => Math.round(v + (b[i] - v) * t));
  const scale = (stops, t) => {
    const x = Math.max(0, Math.min(1, t)) * (stops.length - 1), i = Math.min(stops.length - 2, Math.floor(x));
    return mix(stops[i], stops[i + 1], x - i);
  };
  const LOAD = [[8, 48, 107], [66, 146, 198], [247, 247, 245], [224, 130, 20], [127, 59, 8]];
  const SIGNED = [[0, 114, 178], [247, 247, 245], [213, 94, 0]];

  const widgets = {
    usage(host, spec) {
      const [pick, arms] = select("Arm", spec.arms.map((a) => `${a.name} (seed ${a.seed})`));
      const range = el("input", { type: "range", min: "0", step: "1", id: "usage-step" });
      const says = el("output", { for: "usage-step" });
      const slide = el("label", { text: "Evaluation " }, range);
      const canvas = el("canvas", { role: "img" });
      const info = el("p", { class: "muted", "aria-live": "polite" });
      host.append(el("div", { class: "bar" }, pick, slide, says), canvas, info);
      let load;
      const show = () => {
        const arm = spec.arms[arms.value], [, layers, trees, leaves] = arm.shape, s = Number(range.value);
        says.textContent = `step ${arm.steps[s]}`;
        const wide = leaves, tall = layers * trees + layers - 1;
        canvas.width = wide; canvas.height = tall;
        canvas.setAttribute("aria-label", `Leaf loads of ${arm.name} at step ${arm.steps[s]}`);
        canvas.style.height = `${Math.max(120, tall * 11)}px`;
        const context = canvas.getContext("2d"), image = context.createImageData(wide, tall);
        let dead = 0;
        for (let i = 0; i < image.data.length; i++) image.data[i] = i % 4 === 3 ? 255 : 128;
        for (let l = 0; l < layers; l++) for (let k = 0; k < trees; k++) for (let j = 0; j < leaves; j++) {
          const code = load[((s * layers + l) * trees + k) * leaves + j];
          const value = code === 0 ? -20 : ((code - 1) / 254) * 16 - 8;
          const gone = value < Math.log2(0.01);
          dead += gone;
          const [r, g, b] = gone ? [16, 16, 20] : scale(LOAD, (value + 6) / 12);
          const at = 4 * ((l * (trees + 1) + k) * wide + j);
          image.data[at] = r; image.data[at + 1] = g; image.data[at + 2] = b; image.data[at + 3] = 255;
        }
        context.putImageData(image, 0, 0);
        const all = layers * trees * leaves;
        info.textContent = `Run ${arm.run.slice(0, 8)}: ${dead} of ${all} leaves dead (${(100 * dead / all).toFixed(1)}%). Rows are trees, gaps part the layers.`;
      };
      const start = () => {
        const arm = spec.arms[arms.value];
        load = bytes(arm.load);
        range.max = String(arm.steps.length - 1);
        range.value = range.max;
        show();
      };
      arms.addEventListener("change", start);
      range.addEventListener("input", show);
      start();
    },

    tree(host, spec) {
      const [pick, arms] = select("Arm", spec.arms.map((a) => `${a.name} (seed ${a.seed})`));
      const [pickLayer, layer] = select("Layer", []);
      const [pickTree, tree] = select("Tree", []);
      const ns = "http://www.w3.org/2000/svg";
      const svg = document.createElementNS(ns, "svg");
      svg.setAttribute("role", "img");
      host.append(el("div", { class: "bar" }, pick, pickLayer, pickTree), svg);
      const shape = (tag, attributes) => {
        const node = document.createElementNS(ns, tag);
        for (const [k, v] of Object.entries(attributes)) node.setAttribute(k, v);
        return node;
      };
      const show = () => {
        const arm = spec.arms[arms.value], size = arm.shape[2];
        const at = (Number(layer.value) * arm.shape[1] + Number(tree.value)) * size;
        const share = bytes(arm.share).slice(at, at + size), skew = bytes(arm.skew).slice(at, at + size);
        const deep = Math.log2(size + 1) - 1, width = 960, high = 70 * deep + 40;
        svg.setAttribute("viewBox", `0 0 ${width} ${high}`);
        svg.setAttribute("aria-label", `Tree ${tree.value} of layer ${layer.value}, ${arm.name}`);
        const place = (n) => {
          const level = Math.floor(Math.log2(n + 1)), i = n + 1 - 2 ** level;
          return [((i + 0.5) / 2 ** level) * width, 20 + 70 * level];
        };
        svg.replaceChildren();
        for (let n = 1; n < size; n++) {
          const [x0, y0] = place((n - 1) >> 1), [x1, y1] = place(n), p = (share[n] / 255) ** 2;
          svg.append(shape("line", { x1: x0, y1: y0, x2: x1, y2: y1, "stroke-width": 0.4 + 16 * p, "stroke-linecap": "round", style: "stroke:var(--muted);opacity:.55" }));
        }
        for (let n = 0; n < size; n++) {
          const [x, y] = place(n), p = (share[n] / 255) ** 2, known = skew[n] > 0;
          const value = known ? ((skew[n] - 1) / 254) * 2 - 1 : null;
          const fill = known ? `rgb(${scale(SIGNED, (value + 1) / 2).join(",")})` : "#b9bcc4";
          const dot = shape("circle", { cx: x, cy: y, r: 2.5 + 9 * Math.sqrt(p), fill, "stroke-width": 0.7, style: "stroke:var(--muted)" });
          const title = shape("title", {});
          title.textContent = `${(100 * p).toFixed(1)}% of tokens` + (known ? `, skew ${value.toFixed(2)}` : "");
          dot.append(title);
          svg.append(dot);
        }
      };
      const start = () => {
        const arm = spec.arms[arms.value];
        for (const [box, count, chosen] of [[layer, arm.shape[0], arm.layer], [tree, arm.shape[1], arm.tree]]) {
          box.replaceChildren(...Array.from({ length: count }, (_, i) => el("option", { value: String(i), text: String(i) })));
          box.value = String(chosen);
        }
        show();
      };
      arms.addEventListener("change", start);
      layer.addEventListener("change", show);
      tree.addEventListener("change", show);
      start();
    },

    interactions(host, spec) {
      const pairs = [...new Set(spec.cells.map((c) => JSON.stringify(c.factors)))].map((p) => JSON.parse(p));
      const ends = Object.keys(spec.endpoints);
      const [pick, pair] = select("Pair", pairs.map((p) => p.map((f) => spec.names[f] || f).join(" × ")));
      const [which, endpoint] = select("Endpoint", ends.map((e) => spec.endpoints[e]));
      const node = el("div", { class: "plot", role: "img", "aria-label": "Cell means" });
      host.append(el("div", { class: "bar" }, pick, which), node);
      const show = () => {
        const [a, b] = pairs[pair.value], end = ends[endpoint.value];
        const cells = spec.cells.filter((c) => c.endpoint === end && c.factors[0] === a && c.factors[1] === b);
        const across = [...new Set(cells.map((c) => c.levels[0]))], lines = [...new Set(cells.map((c) => c.levels[1]))];
        node.setAttribute("aria-label", `Cell means of ${spec.names[a]} and ${spec.names[b]}: ${spec.endpoints[end]}`);
        plot(node, {
          data: lines.map((line, i) => ({
            type: "scatter", mode: "lines+markers", name: `${spec.names[b]} ${line}`.replaceAll("<", "&lt;"),
            x: across.map((_, k) => k), y: across.map((v) => cells.find((c) => c.levels[0] === v && c.levels[1] === line)?.mean ?? null),
            line: { color: `var(--c${i % 8})`, dash: ["solid", "dash", "dot", "dashdot"][i % 4] },
            marker: { size: 9, symbol: ["circle", "square", "triangle-up", "diamond"][i % 4], color: `var(--c${i % 8})` },
          })),
          layout: { height: 420, xaxis: { title: { text: spec.names[a] }, tickvals: across.map((_, k) => k), ticktext: across.map((v) => v.replaceAll("<", "&lt;")) },
            yaxis: { title: { text: spec.endpoints[end] } } },
        });
      };
      pair.addEventListener("change", show);
      endpoint.addEventListener("change", show);
      whenNear(node, show);
    },

    runs(host, spec) {
      const keys = Object.keys(spec.columns), settings = Object.keys(spec.settings), count = spec.runs.length;
      const find = el("input", { type: "search", "aria-label": "Filter runs", placeholder: "Filter: arm, status, setting…" });
      const says = el("span", { class: "muted", "aria-live": "polite" });
      const body = el("tbody"), head = el("tr");
      let sort = null, up = true;
      const table = el("table", {}, el("caption", { text: "Choose two runs to compare their settings; a column's title sorts." }), el("thead", {}, head), body);
      const diff = el("div", { class: "muted", "aria-live": "polite" });
      host.append(el("div", { class: "bar" }, find, says), el("div", { class: "scroll", role: "region", tabindex: "0", "aria-label": "Runs" }, table), diff);
      head.append(el("th", { scope: "col", text: "compare" }));
      for (const key of keys) {
        const button = el("button", { type: "button", text: key });
        button.addEventListener("click", () => { up = sort === key ? !up : true; sort = key; show(); });
        head.append(el("th", { scope: "col" }, button));
      }
      head.append(el("th", { scope: "col", text: "run" }));
      const chosen = [];
      const compare = () => {
        diff.replaceChildren();
        if (chosen.length < 2) { diff.textContent = chosen.length ? "Choose one more run." : ""; return; }
        const [a, b] = chosen, rows = settings.filter((s) => spec.settings[s][a] !== spec.settings[s][b]);
        const list = el("table", {}, el("caption", { text: `What differs between ${spec.runs[a].slice(0, 8)} and ${spec.runs[b].slice(0, 8)}` }),
          el("tbody", {}, ...rows.map((s) => el("tr", {}, el("th", { scope: "row", text: s }), el("td", { text: spec.settings[s][a] }), el("td", { text: spec.settings[s][b] })))));
        diff.append(rows.length ? list : el("p", { text: "Nothing but chance: the settings are equal." }));
      };
      const text = (value) => value === null ? "–" : typeof value === "number" && !Number.isInteger(value) ? value.toPrecision(5) : String(value);
      const haystack = Array.from({ length: count }, (_, i) => [...keys.map((k) => spec.columns[k][i]), ...settings.map((s) => `${s}=${spec.settings[s][i]}`)].join(" ").toLowerCase());
      const show = () => {
        const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
        let rows = [...haystack.keys()].filter((i) => words.every((w) => haystack[i].includes(w)));
        if (sort) {
          const v = spec.columns[sort];
          rows.sort((a, b) => (v[a] === v[b] ? a - b : v[a] === null ? 1 : v[b] === null ? -1 : (v[a] < v[b] ? -1 : 1) * (up ? 1 : -1)));
        }
        says.textContent = `${rows.length} of ${spec.total} runs` + (rows.length > 60 ? ", the first 60 shown" : "");
        body.replaceChildren(...rows.slice(0, 60).map((i) => {
          const box = el("input", { type: "checkbox", "aria-label": `Compare run ${spec.runs[i].slice(0, 8)}` });
          box.checked = chosen.includes(i);
          box.addEventListener("change", () => {
            if (box.checked) { chosen.push(i); if (chosen.length > 2) chosen.shift(); } else chosen.splice(chosen.indexOf(i), 1);
            show(); compare();
          });
          const id = el("code", { text: spec.runs[i].slice(0, 8) });
          const run = spec.address && /^[0-9a-f]{32}$/.test(spec.runs[i]) ? el("a", { href: `${spec.address}/#/runs/${spec.runs[i]}?workflowType=machine_learning` }, id) : id;
          return el("tr", {}, el("td", {}, box), ...keys.map((k) => el("td", { text: text(spec.columns[k][i]) })), el("td", {}, run));
        }));
      };
      find.addEventListener("input", show);
      show();
    },
  };
  const cue = () => {
    for (const box of document.querySelectorAll(".scroll, .still")) box.classList.toggle("wide", box.scrollWidth > box.clientWidth + 1);
  };
  addEventListener("resize", cue);
  addEventListener("load", cue);
  for (const host of document.querySelectorAll("[data-widget]")) widgets[host.dataset.widget](host, data.widgets[host.dataset.widget]);
})();
