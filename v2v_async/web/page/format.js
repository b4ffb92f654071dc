// Words for what the server tells, as the terminal has them.

export const PHASES = [
  "checking", "converting", "converted", "copying", "finalizing", "waiting", "failed", "cancelled", "done",
];

const STEPS = new Map([
  ["input", "reading the source"],
  ["convert", "converting"],
  ["output", "making the target"],
  ["copy", "copying"],
  ["finalize", "describing the target"],
  ["cleanup", "cleaning up"],
]);

const IN_BYTES = new Set(["memory", "scratch"]);
const NO_LIMIT = 2 ** 30; // of what counts things: the server's word for "as many as you like"

export const NOTHING = "–";

// Controls, and what shows a text backwards or not at all, are seen and do nothing.
export function clean(text) {
  return String(text)
    .replace(/[\t\n\r\u2028\u2029]/gu, " ")
    .replace(/[\p{Cc}\p{Cf}\p{Cs}]/gu, "\ufffd");
}

export function size(bytes) {
  if (bytes < 1024) return `${Math.round(bytes)} B`;
  let unit = "";
  for (unit of ["KiB", "MiB", "GiB", "TiB"]) {
    bytes /= 1024;
    if (bytes < 1000) break;
  }
  return `${bytes.toFixed(bytes < 100 ? 1 : 0)} ${unit}`;
}

export function rate(bytes) {
  return bytes === null || bytes === undefined ? NOTHING : `${size(bytes)}/s`;
}

export function duration(seconds) {
  if (seconds === null || seconds === undefined) return NOTHING;
  const whole = Math.max(Math.round(seconds), 0);
  const two = (number) => String(number).padStart(2, "0");
  const minutes = Math.floor(whole / 60);
  return minutes < 60
    ? `${minutes}:${two(whole % 60)}`
    : `${Math.floor(minutes / 60)}:${two(minutes % 60)}:${two(whole % 60)}`;
}

export function clock(epoch) {
  const time = new Date(epoch * 1000);
  const options = { hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23" };
  if (time.toDateString() !== new Date().toDateString()) {
    Object.assign(options, { month: "short", day: "numeric" });
  }
  return time.toLocaleString([], options);
}

// Never 100 % before the end, and never 0 % after the beginning.
export function percent(moved, toMove, isDone) {
  if (isDone) return "100 %";
  if (!toMove) return NOTHING;
  const part = Math.min(moved / toMove, 0.999);
  return part > 0 && part < 0.01 ? "< 1 %" : `${Math.floor(part * 100)} %`;
}

export function amount(resource, count) {
  if (IN_BYTES.has(resource)) return size(count);
  return count >= NO_LIMIT ? "no limit" : String(count);
}

export function step(name) {
  return STEPS.get(name) ?? clean(name);
}

function reason(waitsFor, until) {
  if (waitsFor === "time") return until ? `again at ${clock(until)}` : "waits for its time";
  if (waitsFor === "paused") return "paused";
  return `waits for ${clean(waitsFor)}`;
}

// What a guest is at, in few words; `aged`: seconds since it was heard of.
export function activity(guest, aged) {
  const words = [];
  if (guest.paused) words.push("paused");
  const waiting = guest.disks.filter((disk) => disk.waits_for && !disk.outcome);
  if (guest.step) {
    const isSaid = step(guest.step) === guest.phase;
    words.push(`${isSaid ? "" : `${step(guest.step)} `}for ${duration(guest.step_s + aged)}`);
  }
  if (guest.waits_for) {
    if (!guest.paused || guest.waits_for !== "paused") words.push(reason(guest.waits_for, guest.waits_until));
  } else if (waiting.length) {
    const names = waiting.map((disk) => disk.number).join(", ");
    words.push(`disk ${names} ${reason(waiting[0].waits_for, null)}`);
  }
  if (guest.attempt > 1) words.push(`attempt ${guest.attempt}`);
  if (guest.failure) words.push(clean(guest.failure.text));
  return words.join(" · ");
}

export function diskText(disk, isDone) {
  const words = [`disk ${disk.number}: ${percent(disk.moved, disk.to_move, isDone)}`];
  if (disk.to_move) words.push(`${size(disk.moved)} of ${size(disk.to_move)}`);
  if (disk.total && disk.total !== disk.to_move) words.push(`a disk of ${size(disk.total)}`);
  if (disk.verified) words.push(`${size(disk.verified)} compared`);
  if (disk.rate) words.push(rate(disk.rate));
  if (disk.waits_for) words.push(reason(disk.waits_for, null));
  if (disk.outcome && disk.outcome !== "finished") words.push(disk.outcome);
  return words.join(", ");
}
