// What the run adds up to: bytes, time, limits, failures.

import { NOTHING, amount, clean, duration, percent, rate, size, step } from "./format.js";

const FAILURES_AT_ONCE = 5; // more would push the guests off the screen
const SAY_EVERY_MS = 15_000; // to those who listen: more would never let them hear the rest

const byId = (id) => document.getElementById(id);

function write(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

// Makes the list's items those of `keys`; returns a map of them, the new ones made by `make`.
function keep(list, keys, make) {
  const known = new Map([...list.children].map((item) => [item.dataset.key, item]));
  const wanted = new Set(keys);
  for (const [key, item] of known) if (!wanted.has(key)) item.remove();
  return keys.map((key, place) => {
    let item = known.get(key);
    if (!item) {
      item = make(key);
      item.dataset.key = key;
    }
    if (list.children[place] !== item) list.insertBefore(item, list.children[place] ?? null);
    return item;
  });
}

export class Totals {
  #state = null;
  #heard = 0;
  #saidAt = -Infinity;
  #said = "";
  #mostFailures = FAILURES_AT_ONCE;

  constructor() {
    byId("more-failures").addEventListener("click", () => {
      this.#mostFailures = Infinity;
      if (this.#failed) this.showFailures(this.#failed);
    });
  }

  #failed = null;

  update(state) {
    this.#state = state;
    this.#heard = performance.now();
    const { counts, bytes } = state;
    const guests = guestsOf(counts);
    const isDone = state.outcome === "finished";
    const done = counts.done ?? 0;
    const text = percent(bytes.moved, bytes.to_move, isDone);
    write(byId("name"), clean(state.name ?? ""));
    write(byId("run"), [state.run && `run ${clean(state.run)}`, state.paused && "paused"].filter(Boolean).join(" · "));
    write(byId("percent"), text);
    const bar = byId("progress");
    const part = isDone ? 1 : bytes.to_move ? Math.min(bytes.moved / bytes.to_move, 0.999) : 0;
    bar.value = Math.round(part * 1000);
    write(byId("moved"), bytes.to_move ? `${size(bytes.moved)} of ${size(bytes.to_move)}` : NOTHING);
    write(byId("rate"), rate(bytes.rate));
    write(byId("done"), `${done} of ${guests}${counts.failed ? `, ${counts.failed} failed` : ""}`);
    document.title = `${text === NOTHING ? "" : `${text} · `}${clean(state.name ?? "v2v-async")}`;
    this.#showLimits(state.limits);
    this.tick();
    this.#say(text, done, guests);
  }

  // What changes without news.
  tick() {
    const state = this.#state;
    if (!state) return;
    const aged = state.outcome === null ? (performance.now() - this.#heard) / 1000 : 0;
    write(byId("elapsed"), state.started === null ? NOTHING : duration(state.now + aged - state.started));
    const eta = state.bytes.eta_s;
    write(byId("left"), state.outcome ?? (eta === null ? NOTHING : duration(Math.max(eta - aged, 0))));
  }

  showFailures(guests) {
    this.#failed = guests;
    const section = byId("failures");
    section.hidden = guests.length === 0;
    write(section.querySelector("h2"), `Failures (${guests.length})`);
    const shown = guests.slice(0, this.#mostFailures);
    const items = keep(section.querySelector("ul"), shown.map((guest) => guest.name), () => {
      const item = document.createElement("li");
      for (const name of ["who", "why", "hint", "where"]) {
        const line = document.createElement("p");
        line.className = name;
        item.append(line);
      }
      item.firstElementChild.append(document.createElement("bdi"), document.createElement("small"));
      return item;
    });
    items.forEach((item, place) => {
      const { name, failure } = shown[place];
      const [who, why, hint, where] = item.children;
      write(who.firstElementChild, clean(name));
      write(who.lastElementChild, [
        failure.step && step(failure.step),
        failure.disk && `disk ${failure.disk}`,
        failure.offset !== null && `offset ${failure.offset}`,
      ].filter(Boolean).join(", "));
      write(why, clean(failure.text));
      write(hint, clean(failure.hint ?? ""));
      write(where, [failure.log, failure.bundle].filter(Boolean).map(clean).join("  "));
    });
    const more = byId("more-failures");
    more.hidden = shown.length === guests.length;
    write(more, `Show all ${guests.length} failures`);
  }

  #showLimits(limits) {
    const section = byId("limits");
    const names = Object.keys(limits);
    section.hidden = names.length === 0;
    const items = keep(section.querySelector("ul"), names, (name) => {
      const item = document.createElement("li");
      const meter = document.createElement("meter");
      const label = document.createElement("bdi");
      label.textContent = clean(name);
      meter.setAttribute("aria-label", clean(name));
      item.append(label, meter, document.createElement("span"));
      return item;
    });
    items.forEach((item, place) => {
      const { taken, capacity } = limits[names[place]];
      const [, meter, text] = item.children;
      meter.max = Math.max(capacity, 1);
      meter.value = taken;
      item.classList.toggle("full", taken >= capacity);
      write(text, `${amount(names[place], taken)} of ${amount(names[place], capacity)}`);
    });
  }

  #say(text, done, guests) {
    const { counts, outcome, bytes } = this.#state;
    const news = `${outcome} ${done} ${counts.failed ?? 0} ${guests}`;
    const isOver = outcome !== null;
    if (news === this.#said || (!isOver && performance.now() - this.#saidAt < SAY_EVERY_MS)) return;
    this.#said = news;
    this.#saidAt = performance.now();
    const words = [`${done} of ${guests} guests done`];
    if (counts.failed) words.push(`${counts.failed} failed`);
    if (isOver) words.push(outcome === "cancelled" ? "the run was cancelled" : `the run has ${outcome}`);
    else {
      words.push(text);
      if (bytes.eta_s !== null) words.push(`${duration(bytes.eta_s)} left`);
    }
    write(byId("announcement"), words.join(", "));
  }
}

// "paused" is counted beside the phases.
export function guestsOf(counts) {
  return Object.entries(counts).reduce((sum, [name, count]) => sum + (name === "paused" ? 0 : count), 0);
}
