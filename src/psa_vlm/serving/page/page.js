// The page of the service. All that comes from a person or a model is put in as text, never as
// markup; the server's Content-Security-Policy would stop markup that runs, too.

const $ = (id) => document.getElementById(id);

const facts = await (await fetch("ui/facts")).json();
let chosen = []; // images of the next message: {name, url}
let messages = []; // the conversation so far, as the API takes it
let names = []; // of all its images
let waiting = false; // for an answer; one at a time

// --- the service ---------------------------------------------------------------------------------

// Ask, and tell `hear.decided(psa)` before any word, then `hear.wrote(piece)`. The whole text comes
// back; whatever goes wrong is thrown as an Error in words for people.
async function ask(body, hear) {
  let response;
  try {
    response = await fetch("ui/chat", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ model: facts.model, stream: true, ...body }),
    });
  } catch {
    throw new Error("The service does not answer. Is it still running?");
  }
  if (!response.ok) throw new Error((await response.json()).error.message);
  let text = "";
  for await (const event of events(response.body)) {
    if (event.error) throw new Error(`The answer broke off: ${event.error.message}`);
    if (event.psa) hear.decided(event.psa);
    const { content, refusal } = event.choices[0].delta;
    const piece = content ?? refusal ?? "";
    text += piece;
    if (piece) hear.wrote(piece);
  }
  return text;
}

// The data of server-sent events, each parsed.
async function* events(stream) {
  let rest = "";
  for await (const part of pieces(stream.pipeThrough(new TextDecoderStream()))) {
    const lines = (rest + part).split("\n\n");
    rest = lines.pop();
    for (const line of lines) if (line !== "data: [DONE]") yield JSON.parse(line.slice(6));
  }
}

async function* pieces(stream) { // not every browser can iterate a stream itself
  const reader = stream.getReader();
  for (let { done, value } = await reader.read(); !done; { done, value } = await reader.read())
    yield value;
}

// --- what was chosen -----------------------------------------------------------------------------

function read(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve({ name: file.name, url: reader.result });
    reader.onerror = () => reject(new Error(`${file.name}: the browser can't read this file`));
    reader.readAsDataURL(file);
  });
}

async function choose(files) {
  try {
    chosen.push(...(await Promise.all([...files].map(read))));
    note("");
  } catch (error) {
    note(error.message);
  }
  showChosen();
}

function showChosen() {
  $("chosen").replaceChildren(
    ...chosen.map((one, index) => {
      const remove = make("button", "×", { type: "button", ariaLabel: `Remove ${one.name}` });
      remove.onclick = () => {
        chosen.splice(index, 1);
        showChosen();
        $("files").focus();
      };
      const item = make("li");
      item.append(make("img", "", { src: one.url, alt: "" }), make("span", one.name), remove);
      return item;
    }),
  );
}

const note = (text) => ($("note").textContent = text);

// --- a turn --------------------------------------------------------------------------------------

async function send() {
  const text = $("text").value;
  if (waiting) return;
  if (!text.trim()) {
    note("Write what you want to know about the image.");
    return $("text").focus();
  }
  note("");
  const images = chosen;
  const content = [
    ...images.map((one) => ({ type: "image_url", image_url: { url: one.url } })),
    { type: "text", text },
  ];
  const said = [...messages, { role: "user", content }];
  const turn = copy("turn");
  turn.querySelector(".text").textContent = text;
  turn.querySelector(".thumbs").append(
    ...images.map((one) => make("img", "", { src: one.url, alt: one.name })),
  );
  $("welcome").hidden = true;
  $("log").append(turn);
  $("text").value = "";
  chosen = [];
  showChosen();
  const body = { messages: said };
  if ($("policy").value) body.policy = $("policy").value;

  names.push(...images.map((one) => one.name));
  const replies = turn.querySelector(".replies");
  const asked = { body, names: [...names], replies };
  const done = await answer(asked, "Answer", (psa) => showFound(turn, asked, psa));
  if (done) {
    const refused = done.psa.decision.action === "refuse";
    messages = [...said, { role: "assistant", [refused ? "refusal" : "content"]: done.text }];
  } else { // give back what was written, to be mended
    names.splice(names.length - images.length);
    if (!$("text").value && !chosen.length) {
      $("text").value = text;
      chosen = images;
      showChosen();
    }
  }
}

// Put one reply into a turn while it is written; null if there was none or no whole one.
async function answer(asked, title, decided) {
  const reply = copy("reply");
  reply.querySelector("h3").textContent = title;
  asked.replies.append(reply);
  reply.scrollIntoView({ block: "nearest" });
  busy(true);
  let psa = null;
  try {
    const text = await ask(asked.body, {
      decided: (told) => {
        psa = told;
        showDecision(reply, told);
        decided?.(told);
      },
      wrote: (piece) => (reply.querySelector(".text").textContent += piece),
    });
    return { text, psa };
  } catch (error) {
    const told = error.message.replace(
      /^image (\d+): (image of [\d,]+ bytes: )?/,
      (_, index) => `${asked.names[index]}: `,
    );
    reply.append(make("p", told, { className: "problem", role: "alert" }));
    return null;
  } finally {
    reply.setAttribute("aria-busy", "false");
    busy(false);
    reply.scrollIntoView({ block: "nearest" });
  }
}

function busy(is) {
  waiting = is;
  for (const button of document.querySelectorAll("button[type=submit], #new")) button.disabled = is;
}

const ACTIONS = { allow: "allowed", hint: "passed on with a hint", refuse: "refused" };
const NO_RULE = {
  clean: "No risk was found, so no rule was needed.",
  "no-image": "Without an image there is nothing to assess.",
  "verdict-error": "The image could not be assessed, and that is never taken as safe.",
};

function showDecision(reply, { decision, explained }) {
  reply.classList.add(decision.action);
  fill(reply, ".action", ACTIONS[decision.action]);
  const why = NO_RULE[decision.rule] ?? `because of ${facts.types[decision.type]}, level ${decision.level}`;
  fill(reply, ".why", why);
  reply.querySelector(".decision").hidden = false;
  if (explained.source) {
    const { file, line, text, comment } = explained.source;
    fill(reply, ".rule .name", decision.rule);
    fill(reply, ".place", `${file}:${line}`);
    fill(reply, ".rule .text", text);
    fill(reply, ".comment", comment && !text.includes(comment) ? `# ${comment}` : "");
    reply.querySelector(".rule").hidden = false;
  }
  const hint = reply.querySelector("p.hint");
  hint.hidden = !explained.hint;
  hint.textContent = explained.hint ?? "";
}

// --- what was seen -------------------------------------------------------------------------------

function showFound(turn, asked, psa) {
  const { pictures, concepts } = psa.explained;
  if (!pictures.length) return;
  const found = turn.querySelector(".found");
  found.append($("found").content.cloneNode(true));
  found.hidden = false;
  fill(found, "small", `policy ${psa.policy.name}`);
  found.querySelector(".pictures").append(...psa.images.map((_, i) => figure(asked, psa, i)));
  found.querySelector(".switch").hidden = !pictures.some((one) => one.heat);
  found.querySelector(".concepts").append(...concepts.map(concept));
  const known = concepts.length > 0; // not after a verdict that failed
  found.querySelector(".legend").append(...(known ? legend(concepts) : [psa.error]));
  if (known) setUp(turn.querySelector(".override"), asked, concepts);
}

function figure(asked, psa, index) {
  const { image, type, level, type_probs, level_probs } = psa.images[index];
  const { picture, heat } = psa.explained.pictures[index];
  const worst = index === psa.explained.worst;
  const box = make("div");
  box.append(make("img", "", { src: picture, alt: asked.names[image] }));
  if (heat) box.append(make("img", "", { src: heat, alt: "Where it looked", className: "heat" }));
  const told = psa.error
    ? "not assessed"
    : `${facts.types[type]} ${percent(type_probs[type])}, level ${level} ${percent(level_probs[level])}`;
  const shown = make("figure", "", { className: worst ? "worst" : "" });
  const decides = worst && psa.images.length > 1 ? "; this one decides" : "";
  shown.append(box, make("figcaption", told + decides));
  return shown;
}

function concept(one) {
  const item = copy("concept");
  const { band, thresholds, policy_threshold: own } = one;
  const risky = one.level !== facts.levels[0];
  const state = band ?? (risky ? "risky" : "clean");
  item.classList.add(state);
  fill(item, ".name", facts.types[one.type]);
  fill(item, ".score", one.score.toFixed(2));
  item.querySelector(".fill").style.width = `${100 * one.score}%`;
  const words = make("b", band ?? (risky ? one.level : "safe"));
  item.querySelector(".state").append(words, band && risky ? `, ${one.level}` : "");
  const track = item.querySelector(".track");
  let told = `score ${one.score.toFixed(3)}`;
  if (thresholds) {
    track.append(tick("review", thresholds.clean_below), tick("sure", thresholds.risky_above));
    told += `; clean below ${thresholds.clean_below.toFixed(3)}, risky above ${thresholds.risky_above.toFixed(3)}`;
  }
  if (own !== null) {
    track.append(tick("policy", own));
    told += `; the policy acts from ${own.toFixed(3)}`;
  }
  track.ariaLabel = track.title = told;
  return item;
}

function legend(concepts) {
  const parts = ["Bars: risk score. "];
  if (facts.calibration) {
    const { miss_rate, false_refusal, confidence } = facts.calibration;
    parts.push(tick("review"), "surely clean below, ", tick("sure"), "surely risky above: ");
    parts.push(`calibrated so that at most ${percent(miss_rate)} of a risk is missed and ${percent(false_refusal)} of what is harmless stands above, at ${percent(confidence)} confidence. `);
  } else {
    parts.push("This run is not calibrated, so there are no thresholds; ‘psa-vlm calibrate’ makes them. ");
  }
  if (concepts.some((one) => one.policy_threshold !== null)) parts.push(tick("policy"), "the policy's own threshold.");
  return parts;
}

function tick(kind, at) {
  const mark = make("i", "", { className: `tick ${kind}` });
  if (at !== undefined) mark.style.left = `${100 * at}%`;
  return mark;
}

// --- overriding ----------------------------------------------------------------------------------

function setUp(override, asked, concepts) {
  override.hidden = false;
  const form = override.querySelector("form");
  const seen = new Map(concepts.map((one) => [one.type, facts.levels.indexOf(one.level)]));
  const sliders = concepts.map((one) => {
    const label = copy("slider");
    const input = label.querySelector("input");
    input.name = one.type;
    input.max = facts.levels.length - 1;
    input.defaultValue = seen.get(one.type);
    label.querySelector("span").textContent = facts.types[one.type];
    input.oninput = () => {
      const level = facts.levels[input.value];
      label.querySelector("output").value = level;
      input.ariaValueText = level;
      label.classList.toggle("changed", Number(input.value) !== seen.get(one.type));
    };
    input.oninput();
    form.querySelector(".sliders").append(label);
    return input;
  });
  form.onreset = () => setTimeout(() => {
    for (const input of sliders) input.oninput();
    asked.replies.querySelectorAll(".overridden").forEach((one) => one.remove());
    fill(asked.replies, "h3", "Answer");
  });
  form.onsubmit = async (event) => {
    event.preventDefault();
    const changed = sliders.filter((input) => Number(input.value) !== seen.get(input.name));
    if (!changed.length) return sliders[0].focus();
    const given = Object.fromEntries(changed.map((input) => [input.name, facts.levels[input.value]]));
    const told = Object.entries(given).map(([type, level]) => `${facts.types[type]} ${level}`);
    asked.replies.querySelectorAll(".overridden").forEach((one) => one.remove());
    fill(asked.replies, "h3", "As the model saw it");
    const again = { ...asked, body: { ...asked.body, concepts: given } };
    const done = answer(again, `If it were: ${told.join(", ")}`);
    asked.replies.lastElementChild.classList.add("overridden");
    await done;
  };
}

// --- small things --------------------------------------------------------------------------------

function make(tag, text = "", more = {}) {
  const node = Object.assign(document.createElement(tag), more);
  if (text) node.textContent = text;
  return node;
}

const copy = (template) => $(template).content.firstElementChild.cloneNode(true);
const fill = (node, selector, text) => (node.querySelector(selector).textContent = text);
const percent = (share) => `${Number((100 * share).toPrecision(2))}%`;

// --- the start -----------------------------------------------------------------------------------

$("model").textContent = facts.model;
$("policy").append(
  ...facts.policies.map((name, index) =>
    make("option", index ? name : `${name} (served)`, { value: index ? name : "" })),
);
$("files").onchange = async (event) => {
  await choose(event.target.files);
  event.target.value = "";
};
$("ask").onsubmit = (event) => {
  event.preventDefault();
  send();
};
$("text").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
};
document.onpaste = (event) => {
  if (event.clipboardData.files.length) {
    event.preventDefault();
    choose(event.clipboardData.files);
  }
};
document.ondragover = (event) => event.preventDefault();
document.ondrop = (event) => {
  event.preventDefault();
  choose(event.dataTransfer.files);
};
$("new").onclick = () => {
  messages = [];
  names = [];
  $("log").replaceChildren();
  $("welcome").hidden = false;
  $("text").focus();
};
