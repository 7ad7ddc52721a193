"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const words = { F: "forward", B: "backward", I: "gradients of inputs", W: "gradients of weights" };
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  // --- stages and their layers ---
  const tabs = [...document.querySelectorAll(".bar button")];
  const items = (names) => {
    const list = document.createElement("ul");
    for (const name of names) {
      const item = document.createElement("li");
      const code = document.createElement("code");
      code.textContent = name;
      item.append(code);
      list.append(item);
    }
    return list;
  };
  const open = (index) => {
    const stage = data.stages[index];
    const panel = byId("layers");
    tabs.forEach((tab, at) => { tab.setAttribute("aria-selected", String(at === index)); tab.tabIndex = at === index ? 0 : -1; });
    panel.textContent = "";
    const title = document.createElement("p");
    title.textContent = `Stage ${index} on rank ${stage.rank}: ${stage.layers.length} layers, ${stage.time} for one microbatch`;
    panel.append(title, items(stage.layers));
    for (const [label, names] of [["Also run here instead of being sent:", stage.duplicated], ["Recomputed:", stage.recompute]]) {
      if (!names.length) continue;
      const more = document.createElement("p");
      more.textContent = label;
      panel.append(more, items(names));
    }
  };
  tabs.forEach((tab, index) => {
    tab.tabIndex = index ? -1 : 0;
    tab.addEventListener("click", () => open(index));
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      const next = event.key === "Home" ? 0 : event.key === "End" ? tabs.length - 1 : step ? index + step : -1;
      if (next < 0 || next >= tabs.length) return;
      event.preventDefault();
      open(next);
      tabs[next].focus();
    });
  });

  // --- the time line ---
  const box = byId("timeline");
  if (box && data.step) {
    const row = 22, left = 52, top = 18;
    const canvas = document.createElement("canvas");
    const spacer = document.createElement("div");
    box.append(canvas, spacer);
    let zoom = 1, chosen = null;
    const width = () => Math.max((box.clientWidth - left) * zoom, 1);
    const seconds = (value) => `${(value * data.scale).toPrecision(4)} ${data.unit}`;
    if (data.cut) byId("timenote").append(" Only the first actions of each rank are drawn: the step has more.");

    const draw = () => {
      const ratio = window.devicePixelRatio || 1, height = top + row * data.ranks.length + 4;
      canvas.width = box.clientWidth * ratio;
      canvas.height = height * ratio;
      canvas.style.width = `${box.clientWidth}px`;
      canvas.style.height = `${height}px`;
      spacer.style.cssText = `height:1px;width:${left + width()}px`;
      const pen = canvas.getContext("2d"), from = box.scrollLeft;
      pen.scale(ratio, ratio);
      pen.clearRect(0, 0, box.clientWidth, height);
      pen.font = "11px system-ui, sans-serif";
      const fills = { F: colour("--f"), B: colour("--b"), I: colour("--i"), W: colour("--w") };
      const ink = colour("--ink"), on = colour("--on"), line = colour("--line");
      const x = (value) => left + (value / data.step) * width() - from;
      data.ranks.forEach((events, rank) => {
        const y = top + rank * row;
        pen.fillStyle = line;
        pen.fillRect(left, y + row - 4, box.clientWidth, 1);  // idle: nothing but the line
        for (const event of events) {
          const [stage, kind, microbatch, start, end] = event;
          const a = x(start), b = x(end);
          if (b < left || a > box.clientWidth) continue;
          const w = Math.max(b - a - 0.5, 0.7);
          pen.fillStyle = fills[kind];
          // Heights differ by kind, so that kinds are told apart without colour.
          const h = { F: row - 10, B: row - 4, I: row - 6, W: row - 13 }[kind];
          pen.fillRect(a, y + row - 4 - h, w, h);
          if (kind !== "F" && data.stages[stage].recompute.length && w > 3) {  // recomputation: a light edge
            pen.fillStyle = on;
            pen.fillRect(a + 1, y + row - 2 - h, Math.min(3, w / 3), h - 4);
          }
          if (w > 22) {
            pen.fillStyle = on;
            pen.fillText(`${kind}${microbatch}`, a + 4, y + row - 7, w - 6);
          }
          if (event === chosen) {
            pen.strokeStyle = colour("--focus");
            pen.lineWidth = 3;
            pen.strokeRect(a, y + row - 4 - h, w, h);
          }
        }
        let before = 0;
        for (const [, , , start, end] of events) {  // waiting for a message: dots in the gaps between actions
          const a = x(before), b = x(start);
          if (before && b - a > 8 && b > left && a < box.clientWidth) {
            pen.fillStyle = ink;
            pen.fillText("›", Math.max(a + 2, left), y + row - 7);
          }
          before = end;
        }
        pen.clearRect(0, y, left - 2, row);
        pen.fillStyle = ink;
        pen.fillText(`rank ${rank}`, 4, y + row - 7);
      });
      pen.fillStyle = ink;
      const shown = (value) => ((value + from) / width()) * data.step;
      for (const at of [0, 0.25, 0.5, 0.75]) {
        const px = at * (box.clientWidth - left);
        pen.fillText(seconds(shown(px)), left + px, 11);
      }
    };
    const show = (event, rank) => {
      chosen = event;
      const [stage, kind, microbatch, start, end] = event;
      byId("pointed").textContent =
        `rank ${rank}, stage ${stage}, ${words[kind]} of microbatch ${microbatch}: ${seconds(start)} to ${seconds(end)}`;
      draw();
    };
    const find = (px, py) => {
      const rank = Math.floor((py - top) / row), events = data.ranks[rank];
      if (!events) return;
      const when = ((px - left + box.scrollLeft) / width()) * data.step;
      const event = events.find((each) => each[3] <= when && when <= each[4]);
      if (event) show(event, rank);
    };
    const rezoom = (factor) => {
      const middle = (box.scrollLeft + (box.clientWidth - left) / 2) / width();
      zoom = Math.min(Math.max(zoom * factor, 1), 400);
      spacer.style.width = `${left + width()}px`;
      box.scrollLeft = middle * width() - (box.clientWidth - left) / 2;
      draw();
    };
    byId("in").addEventListener("click", () => rezoom(2));
    byId("out").addEventListener("click", () => rezoom(0.5));
    byId("all").addEventListener("click", () => { zoom = 1; box.scrollLeft = 0; draw(); });
    canvas.addEventListener("pointermove", (event) => find(event.offsetX, event.offsetY));
    canvas.addEventListener("pointerdown", (event) => find(event.offsetX, event.offsetY));
    box.addEventListener("scroll", draw);
    box.addEventListener("keydown", (event) => {
      if (event.key === "+" || event.key === "=") rezoom(2);
      else if (event.key === "-") rezoom(0.5);
      else if (event.key === "0") byId("all").click();
      else if (event.key === "Enter" || event.key === " ") {
        const rank = Math.max(data.ranks.findIndex((events) => events.includes(chosen)), 0);
        const events = data.ranks[rank], at = events.indexOf(chosen) + 1;
        if (at < events.length) show(events[at], rank);
        else if (data.ranks[rank + 1]) show(data.ranks[rank + 1][0], rank + 1);
      } else return;
      event.preventDefault();
    });
    new ResizeObserver(draw).observe(box);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
    draw();
  }

  // --- memory over the step ---
  const chart = byId("memory");
  if (chart && data.memory && data.memory.length) {
    const wide = 900, high = 240, left = 70, bottom = 24;
    const most = Math.max(...data.memory.flat().map(([, bytes]) => bytes));
    const top = (data.limit <= 2 * most ? Math.max(most, data.limit) : most) * 1.05;
    const x = (when) => left + (when / data.step) * (wide - left - 8);
    const y = (bytes) => high - bottom - (bytes / top) * (high - bottom - 10);
    const gib = (bytes) => `${(bytes / 2 ** 30).toPrecision(3)} GiB`;
    const drawn = [];  // numbers and words of ours alone: safe as markup
    const add = (name, attributes, inner = "") => {
      const written = Object.entries(attributes).map(([key, value]) => `${key}="${value}"`).join(" ");
      drawn.push(`<${name} ${written}>${inner}</${name}>`);
    };
    const dashes = ["", "7 3", "2 3", "9 3 2 3"];
    data.memory.forEach((curve, rank) => {
      let path = "", last = null;
      for (const [when, bytes] of curve) {
        path += last === null ? `M${x(when)} ${y(bytes)}` : `H${x(when)}V${y(bytes)}`;
        last = bytes;
      }
      const peak = gib(Math.max(...curve.map(([, bytes]) => bytes)));
      add("path", { d: `${path}H${x(data.step)}`, fill: "none", stroke: "var(--f)", "stroke-width": 1.5,
        "stroke-dasharray": dashes[rank % dashes.length], opacity: 0.5 + 0.5 / (1 + Math.floor(rank / 4)) },
        `<title>rank ${rank}: at most ${peak}</title>`);
    });
    for (const part of [0, 0.5, 1]) add("text", { x: 4, y: y(top * part / 1.05) + 4 }, gib(top * part / 1.05));
    if (data.limit <= top) {
      add("line", { x1: left, x2: wide - 8, y1: y(data.limit), y2: y(data.limit), stroke: "var(--b)", "stroke-width": 2 });
      add("text", { x: left + 6, y: y(data.limit) - 4 }, `limit ${gib(data.limit)}`);
    }
    add("text", { x: left, y: high - 6 }, "0");
    add("text", { x: wide - 90, y: high - 6 }, `${(data.step * data.scale).toPrecision(4)} ${data.unit}`);
    chart.innerHTML =
      `<svg viewBox="0 0 ${wide} ${high}" role="img" aria-label="memory of each rank over one step">${drawn.join("")}</svg>`;
  }
  if (tabs.length) open(Math.max(tabs.findIndex((tab) => tab.classList.contains("slowest")), 0));
})();
