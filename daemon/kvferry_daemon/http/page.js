"use strict";
// What comes from the daemon goes into the page as text only: ids and reasons are strangers' words.
const STATES = ["Failed", "Bootstrapping", "WaitingForInput", "Transferring", "Success"];
const find = (id) => document.getElementById(id);
const AGAIN_MS = 2000;
let latest = null;
let explained = null;

function make(tag, text, className) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (className) element.className = className;
  return element;
}

function bar(parts, whole, label) {
  const element = make("div", undefined, "bar");
  element.title = label;
  for (const [count, className] of parts) {
    const part = make("i", undefined, className);
    part.style.width = `${whole ? (100 * count) / whole : 0}%`;
    element.append(part);
  }
  return element;
}

function pool(one) {
  const box = make("div");
  const used = `${one.blocks_free} free, ${one.blocks_leased} leased, ` +
    `${one.blocks_quarantined} quarantined of ${one.blocks_total} blocks`;
  box.append(make("div", `${one.device}, ${one.planes.length} planes, ` +
    `${one.block_size_tokens} tokens a block: ${used}; largest free run ${one.largest_run_blocks}`));
  box.append(bar([[one.blocks_leased, "leased"], [one.blocks_quarantined, "quarantined"]],
    one.blocks_total, used));
  return box;
}

function row(one) {
  const seen = one.snapshot;
  const line = make("tr");
  line.tabIndex = 0;
  const total = seen.total_tokens ?? "?";
  const tokens = make("td", `${seen.sent_tokens} / ${total}`, "tokens");
  const whole = seen.total_tokens ?? Math.max(seen.available_tokens, seen.target_tokens, 1);
  tokens.append(bar([[seen.sent_tokens, "done"]], whole, `${seen.sent_tokens} of ${total}`));
  const why = seen.stall ?? (seen.error ? seen.error.code : "");
  line.append(
    make("td", seen.transfer_id),
    make("td", `${seen.role} ${seen.attempt}`),
    make("td", STATES[seen.state], seen.state === 0 ? "failed" : ""),
    make("td", why.replaceAll("_", " "), "wait"),
    tokens,
    make("td", one.worker),
    make("td", one.ended ? "" : `${one.idle_s.toFixed(1)} s`),
  );
  const open = () => explain(seen.transfer_id);
  line.addEventListener("click", open);
  line.addEventListener("keydown", (event) => event.key === "Enter" && open());
  return line;
}

function fits(one, words) {
  const seen = one.snapshot;
  const text = [seen.transfer_id, seen.role, STATES[seen.state], seen.stall ?? "", one.worker];
  return text.join(" ").toLowerCase().replaceAll("_", " ").includes(words);
}

function show() {
  if (latest === null) return;
  const { status, rows } = latest;
  const drain = status.draining ? ", DRAINING" : "";
  find("daemon").textContent = `${status.version}, pid ${status.pid}, up ` +
    `${Math.round(status.uptime_s)} s${drain}, ${status.workers} workers, ` +
    `peers connect to ${status.peer_address}`;
  find("pools").replaceChildren(...status.pools.map(pool));
  if (!status.pools.length) find("pools").textContent = "none yet: no worker has said hello";
  const waits = Object.entries(status.stalls).map(([name, n]) => `${n} ${name}`.replaceAll("_", " "));
  find("stalls").textContent = waits.join(", ") || "none";
  const words = find("filter").value.trim().toLowerCase().replaceAll("_", " ");
  const shown = rows.transfers.filter((one) => fits(one, words)).reverse();
  const focused = document.activeElement?.closest?.("#rows tr")?.rowIndex;
  find("rows").replaceChildren(...shown.map(row));
  if (focused) find("rows").rows[focused - 1]?.focus();
  find("more").textContent = rows.more ? `${rows.more} more are not shown` : "";
}

async function explain(id) {
  explained = id;
  const parts = await asked(id);
  if (explained !== id) return;
  find("story-id").textContent = id;
  find("story-body").replaceChildren(...parts);
  find("story").hidden = false;
  find("story").scrollIntoView({ block: "nearest" });
}

async function asked(id) {
  let answer, text;
  try {
    answer = await fetch(`explain?id=${encodeURIComponent(id)}`);
    text = await answer.text();
  } catch (error) {
    return [make("p", `the daemon does not answer: ${error.message}`, "failed")];
  }
  if (!answer.ok && answer.status !== 404) {
    return [make("p", `the daemon answers ${answer.status}: ${text}`, "failed")];
  }
  const story = JSON.parse(text);
  if (story.transfers.length) return story.transfers.flatMap(told);
  return [make("p", `not known; near it: ${story.near.join(", ") || "none"}`)];
}

function told(one) {
  const seen = one.seen.snapshot;
  const parts = [make("h3", `${seen.role}, attempt ${seen.attempt}: ${STATES[seen.state]}`)];
  if (seen.error) parts.push(make("p", `${seen.error.code}: ${seen.error.message}`, "failed"));
  if (one.waits_for) {
    const since = one.stalled_s === null ? "" : `, for ${one.stalled_s.toFixed(1)} s`;
    parts.push(make("p", `waits for ${one.waits_for}${since}`, "wait"));
  }
  if (one.helps) parts.push(make("p", `what usually helps: ${one.helps}`));
  if (one.holding) parts.push(make("p", `blocks: ${one.holding}`));
  for (const holder of one.holders) {
    parts.push(make("p", `${holder.blocks} blocks are with ${holder.transfer_id} ${holder.stall ?? ""}`));
  }
  const table = make("table");
  const head = make("tr");
  for (const name of ["ago", "sent", "window", "what happened"]) head.append(make("th", name));
  table.append(head);
  for (const moment of one.moments) {
    const line = make("tr");
    line.append(
      make("td", `${moment.ago_s.toFixed(3)} s`),
      make("td", moment.sent_tokens),
      make("td", `${moment.base_tokens}+${moment.allocated_tokens}`),
      make("td", moment.what),
    );
    table.append(line);
  }
  return [...parts, table];
}

function watch() {
  const events = new EventSource("events");
  events.onmessage = (event) => {
    latest = JSON.parse(event.data);
    find("link").textContent = "";
    show();
  };
  events.onerror = () => {
    find("link").textContent = "the daemon does not answer; trying again";
    // A browser goes on by itself after a lost connection, and never after an answer that is not 200.
    if (events.readyState === EventSource.CLOSED) setTimeout(watch, AGAIN_MS);
  };
}

watch();
find("filter").addEventListener("input", show);
find("story-close").addEventListener("click", () => { explained = null; find("story").hidden = true; });
