// Parses the query in the search box and finds the matching images.
//
//   red circle         both words, anywhere: prompts, id, seed, sampler, the row's columns
//   "red circle"       this exact phrase
//   sampler:euler      within one field, which may be a column of the manifest
//   seed=7  seed!=7    a field with exactly this value, or with another one
//   seed>10            a number: also >=, < and <=
//   -red  -sampler:euler  not this
"use strict";

const TERM = /(-?)(?:([^\s:=<>!"-][^\s:=<>!"]*)(:|=|!=|>=|<=|>|<))?(?:"([^"]*)"?|(\S+))/g;
const COMPARED = {
  ">": (one, other) => one > other,
  ">=": (one, other) => one >= other,
  "<": (one, other) => one < other,
  "<=": (one, other) => one <= other,
};
const ANYWHERE = ["prompt", "negative_prompt", "id", "seed", "sampler", "error"];

// Returns the terms of a query; a field name that no image has is part of the text.
function parseQuery(query, isField) {
  const terms = [];
  for (const [whole, minus, name, sign, quoted, word] of query.matchAll(TERM)) {
    const text = (quoted ?? word).toLowerCase();
    const not = minus === "-";
    if (whole === "-" || (not && !text)) continue; // still being typed
    if (name && isField(name.toLowerCase())) {
      const field = name.toLowerCase();
      if (sign === "!=") terms.push({ field, sign: "=", text, not: !not });
      else terms.push({ field, sign, text, not });
    } else {
      const said = name ? whole.slice(minus.length).replaceAll('"', "").toLowerCase() : text;
      terms.push({ text: said, not });
    }
  }
  return terms;
}

// Returns the query for all images with this value of the field, or null if it cannot be written.
function queryFor(name, value) {
  if (!/^[^\s:=<>!"-][^\s:=<>!"]*$/.test(name)) return null;
  const text = asText(value).replaceAll('"', "");
  return `${name}=${/^[^\s"]+$/.test(text) ? text : `"${text}"`}`;
}

function matches(image, terms) {
  return terms.every((term) => holds(image, term) !== term.not);
}

function holds(image, { field, sign, text }) {
  if (!field) return image.text.includes(text);
  const value = fieldOf(image, field);
  if (value == null) return false;
  const said = asText(value).replaceAll('"', "").toLowerCase();
  // A column of a CSV file has its numbers as text.
  if (sign in COMPARED) return COMPARED[sign](numberOf(said), numberOf(text));
  if (typeof value === "number") return said === text || numberOf(text) === value;
  return sign === "=" ? said === text : said.includes(text);
}

function numberOf(text) {
  return text.trim() === "" ? NaN : Number(text);
}

// Returns the text that a search without a field name looks through.
function searchableText(image) {
  const values = ANYWHERE.map((name) => image[name]).concat(Object.values(image.metadata));
  return values.filter((value) => value != null).map(asText).join("\n").toLowerCase();
}

function fieldOf(image, name) {
  if (name !== "metadata" && name !== "text" && Object.hasOwn(image, name)) return image[name];
  const column = Object.keys(image.metadata).find((key) => key.toLowerCase() === name);
  return column === undefined ? undefined : image.metadata[column];
}

function asText(value) {
  return typeof value === "string" ? value : JSON.stringify(value);
}
