// Which guests are shown: by phase, by text, only those that failed.

import { PHASES } from "./format.js";

export class Filters {
  #phase = "";
  #buttons = new Map();
  #form;
  #group;
  #onChange;

  constructor(form, onChange) {
    this.#form = form;
    this.#group = form.querySelector("#phases");
    this.#onChange = onChange;
    for (const phase of ["", ...PHASES, "paused"]) this.#addButton(phase);
    form.addEventListener("input", () => onChange());
    form.addEventListener("submit", (event) => event.preventDefault());
  }

  accepts() {
    const text = this.#form.querySelector("#text").value.trim().toLocaleLowerCase();
    const onlyFailures = this.#form.querySelector("#only-failures").checked;
    const phase = this.#phase;
    return (guest) => {
      if (phase === "paused" ? !guest.paused : phase && guest.phase !== phase) return false;
      if (onlyFailures && !guest.failure) return false;
      if (!text) return true;
      const words = [guest.name, guest.group, guest.waits_for, guest.failure?.text];
      return words.some((word) => word && word.toLocaleLowerCase().includes(text));
    };
  }

  // Says how many there are of each; a phase without guests has no button, unless it is chosen.
  count(counts, all) {
    for (const [phase, button] of this.#buttons) {
      const count = phase ? counts[phase] ?? 0 : all;
      button.hidden = count === 0 && phase !== "" && phase !== this.#phase;
      const number = button.lastElementChild;
      if (number.textContent !== String(count)) number.textContent = String(count);
    }
  }

  #addButton(phase) {
    const button = document.createElement("button");
    const number = document.createElement("b");
    button.type = "button";
    button.dataset.phase = phase;
    button.append(phase || "all", " ", number);
    button.addEventListener("click", () => {
      this.#phase = phase === this.#phase ? "" : phase;
      this.#mark();
      this.#onChange();
    });
    this.#buttons.set(phase, button);
    this.#group.append(button);
    this.#mark();
  }

  #mark() {
    for (const [phase, button] of this.#buttons) {
      button.setAttribute("aria-pressed", String(phase === this.#phase));
    }
  }
}
