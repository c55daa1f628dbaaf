"use strict";
(() => {
  // On paper nothing is folded away.
  addEventListener("beforeprint", () => {
    for (const part of document.querySelectorAll("details.whole")) part.open = true;
  });

  const source = document.getElementById("item-data");
  if (!source) return;
  const PAGE = 25, PREVIEW = 80;
  const [TASK, NUMBER, OUTCOME, PROMPT, TARGET, TEACHER, STUDENT, TSCORE, SSCORE] = [0, 1, 2, 3, 4, 5, 6, 7, 8];
  const WORDS = { teacher: "teacher only", student: "student only", neither: "neither", both: "both" };
  const { outcomes, tasks, items } = JSON.parse(source.textContent);
  const field = name => document.getElementById("item-" + name);
  let shown = items.map((_, index) => index), page = 0, texts = null;

  // Texts of models are only ever set as text, never as HTML.
  const make = (tag, text, name) => {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (name) made.className = name;
    return made;
  };
  const preview = text => {
    const line = text.replace(/\s+/g, " ").trim();
    return line.length > PREVIEW ? line.slice(0, PREVIEW) + "…" : line || "(empty)";
  };

  function fill(body, item) {
    const beginning = tasks[item[TASK]][1];
    if (beginning) {
      const folded = make("details");
      folded.append(make("summary", `All prompts of this task begin with ${beginning.length.toLocaleString("en")} characters`));
      folded.append(make("pre", beginning));
      body.append(folded);
    }
    const parts = [["Prompt", PROMPT], ["Expected", TARGET]];
    parts.push([`Teacher (${item[TSCORE]})`, TEACHER], [`Student (${item[SSCORE]})`, STUDENT]);
    for (const [name, place] of parts) {
      if (place === TARGET && !item[TARGET]) continue;
      body.append(make("h4", name), make("pre", item[place] || "(empty)"));
    }
  }

  function card(item) {
    const outcome = outcomes[item[OUTCOME]], row = make("li"), part = make("details"), head = make("summary");
    head.append(make("b", WORDS[outcome], "badge " + outcome));
    head.append(make("span", `${tasks[item[TASK]][0]} #${item[NUMBER]}`, "where"));
    const answers = make("span", undefined, "answers");
    for (const [name, place] of [["teacher", TEACHER], ["student", STUDENT]]) {
      const answer = make("span");
      answer.append(make("i", name), " " + preview(item[place]));
      answers.append(answer);
    }
    head.append(answers);
    part.append(head);
    // Filled when it is opened: a page may have 25 prompts of thousands of characters.
    part.addEventListener("toggle", () => {
      if (part.childElementCount > 1) return;
      const body = make("div", undefined, "item");
      fill(body, item);
      part.append(body);
    });
    row.append(part);
    return row;
  }

  function draw() {
    const pages = Math.max(1, Math.ceil(shown.length / PAGE));
    page = Math.min(Math.max(page, 0), pages - 1);
    const from = page * PAGE, some = shown.slice(from, from + PAGE);
    field("list").replaceChildren(...some.map(index => card(items[index])));
    field("list").start = from + 1;
    const range = some.length ? `${from + 1} to ${from + some.length} of ` : "";
    field("count").textContent = `${range}${shown.length.toLocaleString("en")} items`;
    field("page").textContent = `Page ${page + 1} of ${pages}`;
    // A button that is disabled loses the focus, and the keyboard its place.
    field("back").setAttribute("aria-disabled", page === 0);
    field("next").setAttribute("aria-disabled", page === pages - 1);
  }

  function filter() {
    const outcome = field("outcome").value, task = field("task").value;
    const words = field("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    if (words.length && !texts) {
      texts = items.map(item => [PROMPT, TARGET, TEACHER, STUDENT].map(at => item[at]).join("\n").toLowerCase());
    }
    shown = [];
    items.forEach((item, index) => {
      if (outcome !== "" && item[OUTCOME] !== +outcome) return;
      if (task !== "" && item[TASK] !== +task) return;
      if (words.every(word => texts[index].includes(word))) shown.push(index);
    });
    page = 0;
    draw();
  }

  tasks.forEach(([name], index) => field("task").append(new Option(name, index)));
  let waiting;
  field("search").addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(filter, 120);
  });
  for (const name of ["outcome", "task"]) field(name).addEventListener("change", filter);
  const turn = by => { page += by; draw(); };
  field("back").addEventListener("click", () => turn(-1));
  field("next").addEventListener("click", () => turn(1));
  draw();
  document.getElementById("items").classList.add("ready");
})();
