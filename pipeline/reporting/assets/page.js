(() => {
  "use strict";
  const tip = document.getElementById("tip");
  const texts = new Map();
  let shown = null, pinned = null;

  const element = (name, content, kind) => {
    const made = document.createElement(name);
    if (content !== undefined) made.textContent = content;
    if (kind) made.className = kind;
    return made;
  };

  // [[token text, probability, whether it is the token of the text], ...] as a small bar chart
  const choices = (heading, rows) => {
    const list = element("ol");
    for (const [text, probability, same] of rows) {
      const row = element("li"), bar = element("i");
      bar.style.width = `${(100 * probability).toFixed(1)}%`;
      const track = element("b");
      track.append(bar);
      row.append(element("code", text, same ? "hit-text" : ""), track, element("span", `${(100 * probability).toFixed(1)} %`));
      list.append(row);
    }
    return [element("p", heading, "sub"), list];
  };

  const content = (target) => {
    if (target.dataset.tip) return [element("p", target.dataset.tip)];
    const block = target.closest("[data-block]").dataset.block;
    if (!texts.has(block)) texts.set(block, JSON.parse(document.getElementById(block).textContent));
    const { heading, lists } = texts.get(block)[target.dataset.i];
    return [element("p", heading), ...lists.flatMap(([name, rows]) => choices(name, rows))];
  };

  const place = () => {
    const box = shown.getClientRects()[0] || shown.getBoundingClientRect();
    const left = Math.min(Math.max(8, box.left), document.documentElement.clientWidth - tip.offsetWidth - 8);
    const below = box.bottom + 8;
    const top = below + tip.offsetHeight > window.innerHeight ? Math.max(8, box.top - tip.offsetHeight - 8) : below;
    tip.style.transform = `translate(${Math.round(left)}px, ${Math.round(top)}px)`;
  };
  const show = (target) => {
    shown = target;
    tip.replaceChildren(...content(target));
    tip.hidden = false;
    target.setAttribute("aria-describedby", "tip");
    place();
  };
  const hide = () => {
    if (!shown) return;
    shown.removeAttribute("aria-describedby");
    shown.classList.remove("on");
    tip.hidden = true;
    shown = pinned = null;
  };
  const target = (event) => event.target.closest && event.target.closest("[data-tip], [data-i]");

  document.addEventListener("pointerover", (event) => { const found = target(event); if (found && !pinned) show(found); });
  document.addEventListener("pointerout", (event) => { if (target(event) && !pinned) hide(); });
  document.addEventListener("focusin", (event) => { const found = target(event); if (found) { hide(); show(found); } });
  document.addEventListener("focusout", (event) => { if (target(event)) hide(); });
  document.addEventListener("click", (event) => {
    const found = target(event), again = found && found === pinned;
    hide();
    if (found && !again) { show(found); pinned = found; found.classList.add("on"); }
  });
  document.addEventListener("scroll", () => { if (shown) place(); }, { passive: true });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") hide();
    const here = target(event), step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!here || !here.dataset.i || !step) return;
    const all = [...here.closest("[data-block]").querySelectorAll("[data-i]")];
    const next = all[all.indexOf(here) + step];
    if (!next) return;
    event.preventDefault();
    here.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });
  // The title of a chart is its accessible name; as a tooltip over all of it it would be in the way.
  for (const chart of document.querySelectorAll("svg.chart")) {
    const title = chart.querySelector("title");
    chart.setAttribute("aria-label", title.textContent);
    chart.removeAttribute("aria-labelledby");
    title.remove();
  }
})();
