//! A page of metrics, as a scraper reads it.

use std::collections::BTreeMap;

/// The samples of a page of metrics, all of which have help and a type.
pub fn samples(page: &str) -> BTreeMap<String, f64> {
    let (mut found, mut typed) = (BTreeMap::new(), BTreeMap::new());
    for line in page.lines() {
        if let Some(of) = line.strip_prefix("# TYPE ") {
            let (name, kind) = of.split_once(' ').unwrap();
            assert!(["gauge", "counter", "histogram"].contains(&kind), "{line}");
            assert!(
                typed.insert(name.to_owned(), kind).is_none(),
                "twice: {line}"
            );
        } else if let Some(of) = line.strip_prefix("# HELP ") {
            assert!(of.split_once(' ').unwrap().1.len() > 5, "{line}");
        } else {
            let (key, value) = line.rsplit_once(' ').unwrap();
            let mut name = key.split('{').next().unwrap();
            for part in ["_bucket", "_sum", "_count"] {
                let of = name.strip_suffix(part);
                name = of
                    .filter(|of| typed.get(*of) == Some(&"histogram"))
                    .unwrap_or(name);
            }
            let kind = typed.get(name).unwrap_or_else(|| panic!("no type: {line}"));
            assert_eq!(name.ends_with("_total"), *kind == "counter", "{line}");
            let value = value.replace("+Inf", "inf").parse().unwrap();
            assert!(
                found.insert(key.to_owned(), value).is_none(),
                "twice: {line}"
            );
        }
    }
    found
}
