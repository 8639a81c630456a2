/* One run on one screen, kept up to date by server-sent events. */
import { loadOverview, showVerified } from "./around.js";
import { followControls, startControls } from "./controls.js";
import { addSteps, loadCurve, startCurve } from "./curve.js";
import { byId, say, show } from "./dom.js";
import { showStatus } from "./now.js";
import { startRows } from "./rows.js";
import { followStatus, loadHistory, startStream } from "./stream.js";
import { startTalk } from "./talk.js";
import { startTheme } from "./theme.js";

const LOADERS = { curve: loadCurve, history: loadHistory, overview: loadOverview };

function trouble(text) {
  say("trouble", text);
  show("trouble", Boolean(text));
}

async function load(names) {
  const results = await Promise.allSettled(names.map((name) => LOADERS[name]()));
  const failed = results.find((result) => result.status === "rejected");
  if (failed) trouble(failed.reason.message);
}

let wasLost = false;

function follow() {
  const events = new EventSource("api/events");
  events.addEventListener("open", () => {
    trouble("");
    if (wasLost) load(Object.keys(LOADERS)); // what happened meanwhile was not told
    wasLost = false;
  });
  events.addEventListener("error", () => {
    wasLost = true;
    trouble("The page is not connected. It tries again by itself; if it was ended, start it again and open its new link.");
    if (events.readyState === EventSource.CLOSED) setTimeout(follow, 3000);
  });
  events.addEventListener("status", (event) => {
    const status = JSON.parse(event.data);
    trouble("");
    showStatus(status);
    followControls(status);
    followStatus(status);
  });
  events.addEventListener("steps", (event) => addSteps(JSON.parse(event.data)));
  events.addEventListener("changed", (event) => load(JSON.parse(event.data)));
  events.addEventListener("trouble", (event) => trouble(JSON.parse(event.data).error));
}

startTheme();
startCurve();
startStream();
startRows();
startTalk();
startControls((proof) => { showVerified(proof); loadOverview(); });
follow();
load(Object.keys(LOADERS)).then(() => byId("curve").setAttribute("data-ready", "yes"));
