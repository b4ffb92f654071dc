// The page of one batch: what the server tells, shown.

import { Connection } from "./connection.js";
import { Filters } from "./filters.js";
import { Table } from "./table.js";
import { Totals, guestsOf } from "./totals.js";

const byId = (id) => document.getElementById(id);

const table = new Table({
  head: byId("columns"),
  body: byId("rows"),
  more: byId("more-guests"),
  shown: byId("shown"),
});
const filters = new Filters(byId("filters"), () => table.filter(filters.accepts()));
const totals = new Totals();
let outcome = null;

function show(state) {
  outcome = state.outcome;
  totals.update(state);
  filters.count(state.counts, guestsOf(state.counts));
  totals.showFailures(table.guests.filter((guest) => guest.phase === "failed" && guest.failure));
}

function tell(kind, since) {
  const at = since?.toLocaleTimeString([], { hourCycle: "h23" });
  const texts = {
    live: "Live",
    lost: outcome
      ? `The run has ended (${outcome}), and its server with it. This is its last state.`
      : `Connection lost at ${at}. This is what was known then; trying again …`,
    asking: `The stream broke at ${at}; asking every few seconds instead.`,
    refused: "The server does not accept this page’s token any more. Open the address that v2v-async printed when the run began.",
  };
  const place = byId("connection");
  if (place.textContent !== texts[kind]) place.textContent = texts[kind];
  place.dataset.kind = kind === "lost" && outcome ? "ended" : kind;
  document.body.dataset.connection = place.dataset.kind;
}

new Connection({
  onState(state) {
    table.replace(state.guests);
    show(state);
  },
  onChanges(state) {
    table.update(state.guests);
    show(state);
  },
  onStatus: tell,
});

setInterval(() => {
  if (document.visibilityState !== "visible" || document.body.dataset.connection === "lost") return;
  totals.tick();
  table.tick();
}, 1_000);
