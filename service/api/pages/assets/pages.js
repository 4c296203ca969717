// Pages work without this file. It saves reloads: it selects spans in place, moves between them with
// the arrow keys, keeps lists current, and checks a rule while it is typed.

const LIVE_MS = 5000;
const SOON_MS = 500; // a signal is stored a little after it is raised
const TYPING_MS = 300;

async function load(url, options = {}) {
  const answer = await fetch(url, { credentials: "same-origin", ...options });
  if (!answer.ok || answer.redirected) throw new Error(`status ${answer.status}`);
  return new DOMParser().parseFromString(await answer.text(), "text/html");
}

// Waterfall

let wanted = 0; // the number of the last selection, because answers may arrive in another order

async function select(link, scroll) {
  const mine = ++wanted;
  let page;
  try {
    page = await load(link.href);
  } catch {
    location.assign(link.href);
    return;
  }
  if (mine !== wanted) return;
  const found = page.querySelector("[data-waterfall]");
  const here = document.querySelector("[data-waterfall]");
  const id = link.dataset.span;
  const row = id && document.getElementById(`s-${id}`);
  if (!row || !found?.querySelector("#span")) {
    if (!found || !here) return location.assign(link.href);
    here.replaceWith(found); // another part of the trace
  } else {
    for (const each of here.querySelectorAll("a[aria-current]")) each.removeAttribute("aria-current");
    here.querySelector("#span").replaceWith(found.querySelector("#span"));
    here.querySelector(".split").className = found.querySelector(".split").className;
    row.querySelector("a").setAttribute("aria-current", "true");
  }
  history.replaceState(null, "", link.href.replace(/#.*/, ""));
  const panel = document.getElementById("span");
  if (scroll && panel.getBoundingClientRect().top > innerHeight * 0.8) panel.scrollIntoView();
  if (scroll === "row") document.getElementById(`s-${id}`)?.scrollIntoView({ block: "nearest" });
}

document.addEventListener("click", (event) => {
  const link = event.target.closest("a[data-span]");
  if (!link || event.metaKey || event.ctrlKey || event.shiftKey || event.button) return;
  event.preventDefault();
  select(link, link.closest(".rows") ? "panel" : "row");
});

document.addEventListener("keydown", (event) => {
  const link = event.target.closest?.(".rows a[data-span]");
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (!link || !step || event.altKey || event.ctrlKey || event.metaKey) return;
  const links = [...document.querySelectorAll(".rows a[data-span]")];
  const next = links[links.indexOf(link) + step];
  if (!next) return;
  event.preventDefault();
  next.focus();
  select(next, false);
});

// Lists that stay current

const isFirst = !new URLSearchParams(location.search).has("cursor");

async function refresh() {
  const here = document.querySelector("[data-live]");
  if (document.hidden || !here || here.contains(document.activeElement)) return;
  try {
    const page = await load(location.href);
    const found = page.querySelector("[data-live]");
    if (found && !here.contains(document.activeElement)) here.replaceWith(found);
  } catch {
    // The next one may succeed.
  }
}

const listed = isFirst && document.querySelector("[data-live]");
if (listed) {
  const again = async () => {
    await refresh();
    setTimeout(again, LIVE_MS);
  };
  setTimeout(again, LIVE_MS);

  // A signal reloads the list at once. Without the stream, the list is a few seconds late.
  let source;
  let soon;
  const listen = () => {
    if (document.hidden) {
      source?.close();
      source = undefined;
    } else if (!source) {
      source = new EventSource(listed.dataset.live);
      source.addEventListener("signal", () => {
        soon ??= setTimeout(() => {
          soon = undefined;
          refresh();
        }, SOON_MS);
      });
    }
  };
  document.addEventListener("visibilitychange", listen);
  listen();
}

// Pages of something that is being stored

const WAIT_MS = 1000;

if (document.querySelector("[data-wait]")) {
  setInterval(() => {
    if (!document.hidden && !document.activeElement.closest("form")) location.reload();
  }, WAIT_MS);
}

// Rules

const editor = document.querySelector("form[data-check]");
if (editor) {
  let timer;
  let asked = 0;
  const condition = editor.elements.condition;
  const check = async () => {
    const mine = ++asked;
    const form = new URLSearchParams();
    form.set("condition", condition.value);
    form.set("form_token", editor.elements.form_token.value);
    try {
      const answer = await fetch(editor.dataset.check, { method: "POST", body: form });
      if (!answer.ok || mine !== asked) return;
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      document.getElementById("checked").replaceChildren(...page.body.childNodes);
    } catch {
      // Checked again after the next key.
    }
  };
  condition.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(check, TYPING_MS);
  });
}
