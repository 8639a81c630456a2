/* Numbers, times and sizes for people. */
const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

export const count = (value) => (value === null || value === undefined ? "–" : whole.format(value));

export function few(value, digits = 4) {
  if (value === null || value === undefined) return "–";
  if (value !== 0 && (Math.abs(value) < 1e-4 || Math.abs(value) >= 1e6)) return value.toExponential(Math.max(2, digits - 2)).replace(/\.?0*e\+?/, "e");
  return String(Number(value.toPrecision(digits)));
}

export const fixed = (value, digits = 4) => (value === null || value === undefined ? "–" : value.toFixed(digits));

/* A name as a person can tell it from others: in quotes where blanks stand at an end. */
export const named = (name) => (name === name.trim() && name !== "" ? name : `"${name}"`);

export const afterFile = (point) => (point.file === null ? "the base" : `after ${named(point.file)}`);

export const counted = (number, word) => `${count(number)} ${word}${number === 1 ? "" : "s"}`;

export const files = (number) => counted(number, "file");

export function size(bytes) {
  if (bytes === null || bytes === undefined) return "–";
  const units = ["B", "kB", "MB", "GB", "TB"];
  let value = bytes, unit = 0;
  while (value >= 999.5 && unit < units.length - 1) { value /= 1000; unit += 1; }
  return `${unit === 0 || value >= 99.95 ? value.toFixed(0) : value.toFixed(1)} ${units[unit]}`;
}

export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  const total = Math.round(seconds);
  const [days, hours, minutes] = [Math.floor(total / 86400), Math.floor(total / 3600) % 24, Math.floor(total / 60) % 60];
  if (days) return `${days} d ${hours} h`;
  if (hours) return `${hours} h ${minutes} min`;
  return minutes ? `${minutes} min ${total % 60} s` : `${total} s`;
}

export function ago(time) {
  const seconds = Date.now() / 1000 - time;
  return seconds < 10 ? "just now" : `${duration(seconds).split(" ").slice(0, 2).join(" ")} ago`;
}

export function clock(time) {
  const at = new Date(time * 1000);
  const two = (number) => String(number).padStart(2, "0");
  const hour = `${two(at.getHours())}:${two(at.getMinutes())}:${two(at.getSeconds())}`;
  const today = at.toDateString() === new Date().toDateString();
  return today ? hour : `${two(at.getMonth() + 1)}-${two(at.getDate())} ${hour.slice(0, 5)}`;
}
