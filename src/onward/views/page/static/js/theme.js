/* Light, dark, or what the system has. */
import { byId } from "./dom.js";

const THEMES = ["system", "light", "dark"];
const KEY = "onward-theme";
const changed = new EventTarget();

function stored() {
  try { return THEMES.includes(localStorage.getItem(KEY)) ? localStorage.getItem(KEY) : "system"; } catch { return "system"; }
}

function apply(theme) {
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  const button = byId("theme");
  if (button) button.textContent = `Theme: ${theme}`;
  changed.dispatchEvent(new Event("change"));
}

export function startTheme() {
  apply(stored());
  byId("theme").addEventListener("click", () => {
    const next = THEMES[(THEMES.indexOf(stored()) + 1) % THEMES.length];
    try { localStorage.setItem(KEY, next); } catch { /* kept for this page only */ }
    apply(next);
  });
  for (const query of ["(prefers-color-scheme: dark)", "print"]) {
    matchMedia(query).addEventListener("change", () => changed.dispatchEvent(new Event("change")));
  }
}

export const onTheme = (call) => changed.addEventListener("change", call);

export const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
