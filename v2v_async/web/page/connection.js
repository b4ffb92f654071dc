// Keeps the page told: by a stream; by asking now and then where the stream breaks.
//
//   connecting ─> live ─> lost ─> asking ─> live
//                           └──> lost (again, after a longer while)

const SILENCE_MS = 15_000; // the server says something every 5 s
const FIRST_WAIT_MS = 1_000;
const LAST_WAIT_MS = 15_000;
const ANSWER_WITHIN_MS = 10_000;

export class Connection {
  #onState;
  #onChanges;
  #onStatus;
  #source = null;
  #heard = 0;
  #lostAt = null;
  #wait = FIRST_WAIT_MS;
  #timer = 0;

  // onStatus(kind, since): live, lost, asking or refused; since when, for those that are not live.
  constructor({ onState, onChanges, onStatus }) {
    this.#onState = onState;
    this.#onChanges = onChanges;
    this.#onStatus = onStatus;
    setInterval(() => this.#listen(), 1_000);
    const soon = () => {
      if (this.#source === null && document.visibilityState === "visible") this.#ask();
    };
    addEventListener("online", soon);
    document.addEventListener("visibilitychange", soon);
    this.#open();
  }

  #open() {
    const source = new EventSource("api/changes");
    this.#source = source;
    this.#heard = performance.now();
    source.addEventListener("state", (event) => {
      this.#heard = performance.now();
      this.#lostAt = null;
      this.#wait = FIRST_WAIT_MS;
      this.#onStatus("live", null);
      this.#onState(JSON.parse(event.data));
    });
    source.addEventListener("changes", (event) => {
      this.#heard = performance.now();
      this.#onChanges(JSON.parse(event.data));
    });
    source.onerror = () => this.#lose(source);
  }

  // A connection may be gone without a word, as after a laptop has slept.
  #listen() {
    if (this.#source && performance.now() - this.#heard > SILENCE_MS) this.#lose(this.#source);
  }

  #lose(source) {
    source.close();
    if (source !== this.#source) return;
    this.#source = null;
    if (this.#lostAt === null) {
      this.#lostAt = new Date();
      this.#onStatus("lost", this.#lostAt);
    }
    this.#later();
  }

  #later() {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#ask(), this.#wait);
    this.#wait = Math.min(this.#wait * 2, LAST_WAIT_MS);
  }

  async #ask() {
    clearTimeout(this.#timer);
    try {
      const answer = await fetch("api/state", { signal: AbortSignal.timeout(ANSWER_WITHIN_MS) });
      if (answer.status === 401) {
        this.#onStatus("refused", this.#lostAt);
        return this.#later();
      }
      if (!answer.ok) throw new Error(`status ${answer.status}`);
      this.#onState(await answer.json());
      this.#onStatus("asking", this.#lostAt);
    } catch {
      this.#onStatus("lost", this.#lostAt);
      return this.#later();
    }
    if (this.#source === null) this.#open();
  }
}
