// Parses the query in the search box and finds the matching images.
//
//   red circle         both words, anywhere: prompts, id, seed, sampler, the row's columns
//   "red circle"       this exact phrase
//   sampler:euler      within one field, which may be a column of the manifest
//   seed=7             a field with exactly this value
"use strict";

const TERM = /(?:([^\s:="]+)([:=]))?(?:"([^"]*)"?|(\S+))/g;
const ANYWHERE = ["prompt", "negative_prompt", "id", "seed", "sampler", "error"];

// Returns the terms of a query; a field name that no image has is part of the text.
function parseQuery(query, isField) {
  const terms = [];
  for (const [whole, name, sign, quoted, word] of query.matchAll(TERM)) {
    const text = quoted ?? word;
    if (name && isField(name.toLowerCase())) {
      terms.push({ field: name.toLowerCase(), exactly: sign === "=", text: text.toLowerCase() });
    } else {
      terms.push({ text: (name ? whole.replaceAll('"', "") : text).toLowerCase() });
    }
  }
  return terms;
}

// Returns the query for all images with this value of the field, or null if it cannot be written.
function queryFor(name, value) {
  if (!/^[^\s:="]+$/.test(name)) return null;
  const text = asText(value).replaceAll('"', "");
  return `${name}=${/^[^\s"]+$/.test(text) ? text : `"${text}"`}`;
}

function matches(image, terms) {
  return terms.every((term) => {
    if (!term.field) return image.text.includes(term.text);
    const value = fieldOf(image, term.field);
    if (value == null) return false;
    const text = asText(value).replaceAll('"', "").toLowerCase();
    return term.exactly || typeof value === "number" ? text === term.text : text.includes(term.text);
  });
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
