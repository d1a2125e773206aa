"use strict";
const names = { shop: "店铺", price: "价格", kind: "品类", colour: "颜色", pattern: "图案", place: "场景", material: "材质", brand: "品牌", id: "编号" };
const words = {
  zh: {
    title: "商品搜索", query: "查询", hint: "例如：红色条纹连衣裙", search: "搜索", topics: "主题", close: "关闭", interface: "接口", other: "English",
    legend: "绿框支持匹配，红框反对；越深越重要。", made_up: "商品与图片均为程序生成。", working: "搜索中…", nothing: "没有找到商品。",
    found: (n, ms) => `${n} 件商品，${ms} 毫秒`, score: (s) => `匹配分 ${s}`, offline: "服务没有应答，请稍后再试。", key: "请输入访问密钥",
    facts: (m, i) => `模型 ${m} · 索引 ${i}`,
  },
  en: {
    title: "Product search", query: "Query", hint: "for example: 红色条纹连衣裙", search: "Search", topics: "Topics", close: "Close",
    interface: "API", other: "中文", legend: "Green boxes support the match, red ones count against it; stronger colours matter more.",
    made_up: "Products and pictures are generated.", working: "Searching…", nothing: "No products found.",
    found: (n, ms) => `${n} products, ${ms} ms`, score: (s) => `match ${s}`, offline: "The service is not responding; try again later.",
    key: "Access key", facts: (m, i) => `model ${m} · index ${i}`,
  },
};
const $ = (selector) => document.querySelector(selector);
const facts = JSON.parse(document.documentElement.dataset.facts);
let language = localStorage.getItem("language") || (navigator.language.startsWith("zh") ? "zh" : "en");
let asked = 0; // number of the newest question; answers to older ones are not shown
let opened = 0; // number of the newest product opened; boxes of older ones are not drawn
let shown = null; // {text, task, answer}
const say = (name, ...values) => (typeof words[language][name] === "function" ? words[language][name](...values) : words[language][name]);

async function call(path, body) {
  const headers = { "content-type": "application/json" };
  if (facts.protected) headers.authorization = `Bearer ${sessionStorage.getItem("key") || ""}`;
  let response;
  try {
    response = await fetch(path, body ? { method: "POST", headers, body: JSON.stringify(body) } : { headers });
  } catch {
    throw new Error(say("offline"));
  }
  if (response.status === 401 && facts.protected) {
    const key = prompt(say("key"));
    if (key) {
      sessionStorage.setItem("key", key);
      return call(path, body);
    }
  }
  const answer = await response.json().catch(() => { // a proxy's error page, not our JSON
    throw new Error(say("offline"));
  });
  if (!response.ok) throw new Error(answer.error);
  return answer;
}

function speak() {
  document.documentElement.lang = language;
  for (const part of document.querySelectorAll("[data-say]")) part.textContent = say(part.dataset.say);
  for (const part of document.querySelectorAll("[data-hint]")) part.placeholder = say(part.dataset.hint);
  $("#language").textContent = say("other");
  $("#language").lang = language === "zh" ? "en" : "zh";
  document.title = say("title");
  if (shown) report();
}

function status(text, wrong = false) {
  $("#status").textContent = text;
  $("#status").classList.toggle("wrong", wrong);
}

function report() {
  const { results, timings, model, index } = shown.answer;
  status(results.length ? say("found", results.length, Math.round(timings.queue_ms + timings.compute_ms)) : say("nothing"));
  $("#facts").textContent = say("facts", model, index);
}

async function find(path, body, text) {
  const mine = ++asked;
  status(say("working"));
  try {
    const answer = await call(path, body);
    if (mine !== asked) return;
    shown = { text, task: path === "recommend" ? "recommendation" : "search", answer };
    report();
    $("#results").replaceChildren(...answer.results.map(card));
  } catch (error) {
    if (mine !== asked) return;
    $("#results").replaceChildren();
    shown = null;
    status(error.message, true);
  }
}

async function picture(image, item) {
  const source = `pictures/${encodeURIComponent(item.item_id)}`;
  image.alt = item.title || item.item_id;
  image.dataset.of = item.item_id; // a late picture of another product is not shown
  if (!facts.protected) {
    image.src = source;
    return;
  }
  try { // <img> cannot send a key
    const response = await fetch(source, { headers: { authorization: `Bearer ${sessionStorage.getItem("key") || ""}` } });
    if (!response.ok) throw new Error(response.statusText);
    const reader = new FileReader();
    reader.onload = () => {
      if (image.dataset.of === item.item_id) image.src = reader.result;
    };
    reader.readAsDataURL(await response.blob());
  } catch {
    if (image.dataset.of === item.item_id) image.removeAttribute("src"); // shows its title instead
  }
}

function card(item) {
  const button = document.createElement("button"), image = new Image(), title = document.createElement("span");
  const score = document.createElement("small"), entry = document.createElement("li");
  button.type = "button";
  image.loading = "lazy";
  picture(image, item);
  title.textContent = item.title || item.item_id;
  score.textContent = [item.attributes.price && `¥${item.attributes.price}`, item.score.toFixed(2)].filter(Boolean).join(" · ");
  button.append(image, title, score);
  button.onclick = () => open(item);
  entry.append(button);
  return entry;
}

async function open(item) {
  const mine = ++opened;
  const dialog = $("#product"), svg = dialog.querySelector("svg"), list = dialog.querySelector("dl");
  dialog.querySelector("h2").textContent = item.title || item.item_id;
  dialog.querySelector(".score").textContent = say("score", item.score.toFixed(2));
  picture(dialog.querySelector("img"), item);
  svg.replaceChildren();
  list.replaceChildren();
  for (const [name, value] of Object.entries({ id: item.item_id, ...item.attributes })) {
    const term = document.createElement("dt"), text = document.createElement("dd");
    term.textContent = (language === "zh" && names[name]) || name;
    text.textContent = value;
    list.append(term, text);
  }
  dialog.showModal();
  try {
    const { text, task } = shown;
    const { regions } = await call("score", { text, task, item_ids: [item.item_id], explain: true });
    if (mine !== opened) return;
    for (const { box: [x1, y1, x2, y2], weight } of regions) {
      const rectangle = document.createElementNS("http://www.w3.org/2000/svg", "rect");
      for (const [name, value] of Object.entries({ x: x1, y: y1, width: x2 - x1, height: y2 - y1 })) rectangle.setAttribute(name, value);
      rectangle.setAttribute("class", weight > 0 ? "for" : "against");
      rectangle.setAttribute("stroke-opacity", Math.abs(weight).toFixed(2));
      svg.append(rectangle);
    }
  } catch (error) {
    if (mine === opened) dialog.querySelector(".score").textContent = error.message;
  }
}

function press(chosen) {
  for (const button of document.querySelectorAll("#topics button")) button.setAttribute("aria-pressed", button === chosen);
}

async function start() {
  speak();
  $("#query").focus();
  $("#made-up").hidden = !facts.generated;
  $("form[role=search]").onsubmit = (event) => {
    event.preventDefault();
    const query = $("#query").value.trim();
    if (!query) return;
    press(null);
    find("search", { query, k: 24 }, query);
  };
  $("#language").onclick = () => {
    language = language === "zh" ? "en" : "zh";
    localStorage.setItem("language", language);
    speak();
  };
  $("h1 a").onclick = () => {
    asked++;
    shown = null;
    $("#results").replaceChildren();
    $("#query").value = "";
    status("");
    press(null);
  };
  document.onkeydown = (event) => {
    if (event.key === "/" && !["INPUT", "TEXTAREA"].includes(document.activeElement.tagName)) {
      event.preventDefault();
      $("#query").select();
    }
  };
  try {
    const topics = await call("topics");
    $("nav").hidden = !topics.length;
    $("#topics").replaceChildren(...topics.map((topic) => {
      const entry = document.createElement("li"), button = document.createElement("button");
      button.type = "button";
      button.textContent = topic.name;
      button.setAttribute("aria-pressed", false);
      button.onclick = () => {
        press(button);
        find("recommend", { topic_id: topic.topic_id, k: 24 }, topic.text);
      };
      entry.append(button);
      return entry;
    }));
  } catch (error) {
    status(error.message, true);
  }
}
start();
