// The table of guests: a row is made once, and only what changed in it is written again.

import { NOTHING, PHASES, activity, clean, diskText, duration, percent, rate, size } from "./format.js";

const ROWS_AT_ONCE = 500;
const BARS_WITH_TEXT = 3;
const byName = new Intl.Collator(undefined, { numeric: true }).compare;

const sum = (numbers) => numbers.reduce((total, each) => total + each, 0);
const toMove = (guest) => sum(guest.disks.map((disk) => disk.to_move));
const moved = (guest) => sum(guest.disks.map((disk) => disk.moved));
const speed = (guest) => sum(guest.disks.map((disk) => disk.rate ?? 0));
const part = (guest) => (guest.phase === "done" ? 1 : toMove(guest) ? moved(guest) / toMove(guest) : 0);

function left(guest) {
  const times = guest.disks.map((disk) => disk.eta_s).filter((eta) => eta !== null);
  return guest.running && times.length ? Math.max(...times) : null;
}

// key: what it is sorted by, small first. isNumber: a first click sorts the largest first.
const COLUMNS = [
  { id: "name", title: "Guest", key: null },
  { id: "phase", title: "Phase", key: (guest) => PHASES.indexOf(guest.phase) },
  { id: "activity", title: "Now" },
  { id: "disks", title: "Disks", key: part, isNumber: true },
  { id: "moved", title: "Moved", key: moved, isNumber: true },
  { id: "rate", title: "Rate", key: speed, isNumber: true },
  { id: "left", title: "Left", key: (guest) => left(guest) ?? -1, isNumber: true },
  { id: "elapsed", title: "Elapsed", key: (guest) => guest.elapsed_s ?? -1, isNumber: true },
];

function element(tag, name, text) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  return made;
}

function write(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

class Row {
  constructor(name) {
    this.node = element("tr");
    const head = element("th", "name");
    head.scope = "row";
    head.append(element("bdi", "", clean(name)));
    this.group = element("small", "quiet");
    head.append(this.group);
    this.node.append(head);
    this.cells = {};
    for (const { id } of COLUMNS.slice(1)) {
      this.cells[id] = element("td", id);
      this.node.append(this.cells[id]);
    }
    this.phase = element("span", "phase");
    this.cells.phase.append(this.phase);
    this.bars = [];
  }

  update(guest) {
    this.node.dataset.phase = guest.phase;
    write(this.group, guest.group ? clean(guest.group) : "");
    write(this.phase, guest.phase);
    this.phase.dataset.phase = guest.phase;
    const bytes = toMove(guest);
    write(this.cells.moved, bytes ? `${size(moved(guest))} of ${size(bytes)}` : NOTHING);
    write(this.cells.rate, speed(guest) ? rate(speed(guest)) : NOTHING);
    write(this.cells.left, duration(left(guest)));
    this.#updateBars(guest);
  }

  tick(guest, aged) {
    const isGrowing = guest.running && guest.elapsed_s !== null;
    write(this.cells.elapsed, duration(isGrowing ? guest.elapsed_s + aged : guest.elapsed_s));
    write(this.cells.activity, activity(guest, aged));
  }

  #updateBars({ disks, phase }) {
    while (this.bars.length > disks.length) this.bars.pop().node.remove();
    this.cells.disks.classList.toggle("many", disks.length > BARS_WITH_TEXT);
    disks.forEach((disk, index) => {
      let bar = this.bars[index];
      if (!bar) {
        bar = { node: element("span", "bar"), fill: element("i"), text: element("b"), label: "" };
        bar.node.setAttribute("role", "img");
        bar.node.append(bar.fill, bar.text);
        this.cells.disks.append(bar.node);
        this.bars.push(bar);
      }
      const isDone = disk.outcome === "finished" || phase === "done";
      const label = diskText(disk, isDone);
      if (label === bar.label) return;
      bar.label = label;
      bar.node.setAttribute("aria-label", label);
      bar.node.title = label;
      bar.node.dataset.outcome = isDone ? "finished" : disk.outcome ?? "";
      const fraction = isDone ? 1 : disk.to_move ? Math.min(disk.moved / disk.to_move, 1) : 0;
      bar.fill.style.inlineSize = `${(fraction * 100).toFixed(1)}%`;
      write(bar.text, percent(disk.moved, disk.to_move, isDone));
    });
  }
}

export class Table {
  #head;
  #body;
  #more;
  #shown;
  #rows = new Map();
  #places = new Map();
  #guests = new Map();
  #filter = () => true;
  #sort = { id: "phase", sign: 1 };
  #most = ROWS_AT_ONCE;

  constructor({ head, body, more, shown }) {
    this.#head = head;
    this.#body = body;
    this.#more = more;
    this.#shown = shown;
    for (const column of COLUMNS) this.#head.append(this.#heading(column));
    this.#more.addEventListener("click", () => {
      this.#most += ROWS_AT_ONCE;
      this.arrange();
    });
  }

  // All guests anew: those of another state are forgotten.
  replace(guests) {
    const names = new Set(guests.map((guest) => guest.name));
    for (const name of this.#guests.keys()) {
      if (!names.has(name)) {
        this.#rows.get(name)?.node.remove();
        this.#rows.delete(name);
        this.#guests.delete(name);
        this.#places.delete(name);
      }
    }
    guests.forEach((guest, place) => this.#places.set(guest.name, place));
    this.update(guests);
  }

  update(guests) {
    for (const guest of guests) {
      guest.heard = performance.now();
      this.#guests.set(guest.name, guest);
      if (!this.#places.has(guest.name)) this.#places.set(guest.name, this.#places.size);
      this.#rows.get(guest.name)?.update(guest);
      this.#rows.get(guest.name)?.tick(guest, 0);
    }
    this.arrange();
  }

  get guests() {
    return [...this.#guests.values()];
  }

  filter(accepts) {
    this.#filter = accepts;
    this.#most = ROWS_AT_ONCE;
    this.arrange();
  }

  // What grows without news.
  tick() {
    for (const [name, row] of this.#rows) {
      const guest = this.#guests.get(name);
      if (guest.running && row.node.isConnected) {
        row.tick(guest, (performance.now() - guest.heard) / 1000);
      }
    }
  }

  // Puts the rows in order, moving only those that are out of it.
  arrange() {
    const wanted = this.guests.filter(this.#filter).sort((a, b) => this.#compare(a, b));
    let next = this.#body.firstElementChild;
    for (const guest of wanted.slice(0, this.#most)) {
      const { node } = this.#row(guest);
      if (node === next) next = next.nextElementSibling;
      else this.#body.insertBefore(node, next);
    }
    while (next) {
      const gone = next;
      next = next.nextElementSibling;
      gone.remove();
    }
    this.#more.hidden = wanted.length <= this.#most;
    write(this.#more, `Show more (${Math.min(this.#most, wanted.length)} of ${wanted.length})`);
    write(this.#shown, wanted.length === this.#guests.size
      ? `${wanted.length} guests`
      : `${wanted.length} of ${this.#guests.size} guests`);
  }

  #row(guest) {
    let row = this.#rows.get(guest.name);
    if (!row) {
      row = new Row(guest.name);
      this.#rows.set(guest.name, row);
      row.update(guest);
      row.tick(guest, 0);
    }
    return row;
  }

  #compare(a, b) {
    const { id, sign } = this.#sort;
    const { key } = COLUMNS.find((column) => column.id === id);
    const order = key ? key(a) - key(b) : byName(a.name, b.name);
    return sign * order || this.#places.get(a.name) - this.#places.get(b.name);
  }

  #heading(column) {
    const cell = element("th", column.id);
    cell.scope = "col";
    if (column.key === undefined) {
      cell.textContent = column.title;
      return cell;
    }
    const button = element("button", "", column.title);
    button.type = "button";
    button.addEventListener("click", () => {
      const { id, sign } = this.#sort;
      const first = column.isNumber ? -1 : 1;
      this.#sort = { id: column.id, sign: id === column.id ? -sign : first };
      this.#markSorted();
      this.arrange();
    });
    cell.append(button);
    if (column.id === this.#sort.id) cell.setAttribute("aria-sort", "ascending");
    return cell;
  }

  #markSorted() {
    for (const cell of this.#head.children) {
      if (cell.className === this.#sort.id) {
        cell.setAttribute("aria-sort", this.#sort.sign > 0 ? "ascending" : "descending");
      } else cell.removeAttribute("aria-sort");
    }
  }
}
