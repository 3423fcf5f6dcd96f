//! JSON values out of a stream of bytes: they end where they end, not at the end of a line.

use serde_json::Value;

use super::distinct::Distinct;

/// Longest value in bytes.
pub(super) const LIMIT: usize = 1 << 20;

/// Cuts a stream into values. After what is no JSON it goes on at the next line, or at the next value.
#[derive(Debug, Default)]
pub(super) struct Values {
    /// The value under way.
    value: Vec<u8>,
    depth: usize,
    /// Within a string, and behind a backslash in it.
    string: bool,
    escaped: bool,
}

/// A value was longer than [`LIMIT`]: where it ends is not looked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct TooLong;

impl Values {
    /// The next bytes of the stream; `each` gets every value that ends in them, or why there is none.
    pub(super) fn feed(
        &mut self,
        bytes: &[u8],
        mut each: impl FnMut(Result<Value, String>),
    ) -> Result<(), TooLong> {
        for &byte in bytes {
            if self.takes(byte) {
                self.value.push(byte);
            }
            if self.value.len() > LIMIT {
                return Err(TooLong);
            }
            if self.ends(byte) {
                let value = serde_json::from_slice(&self.value);
                let value = value.map(|Distinct(value)| value);
                each(value.map_err(|error| format!("no JSON: {error}")));
                *self = Self::default();
                // What ended something outside of any object begins the next.
                if byte == b'{' {
                    self.value.push(byte);
                    self.depth = 1;
                }
            }
        }
        Ok(())
    }

    /// Whether a byte is part of the value under way, whose state it changes.
    fn takes(&mut self, byte: u8) -> bool {
        if self.string {
            self.string = self.escaped || byte != b'"';
            self.escaped = byte == b'\\' && !self.escaped;
            return true;
        }
        match byte {
            b'{' | b'[' if self.depth > 0 || self.value.is_empty() => self.depth += 1,
            b'{' => return false,
            b'}' | b']' => self.depth = self.depth.saturating_sub(1),
            b'"' if self.depth > 0 => self.string = true,
            _ if self.depth == 0 => return !byte.is_ascii_whitespace(),
            _ => {}
        }
        true
    }

    /// Whether the value ends with this byte: a raw newline is in no JSON string, and where there is no object a line is
    /// all there is.
    fn ends(&self, byte: u8) -> bool {
        if self.value.is_empty() {
            return false;
        }
        match byte {
            b'}' | b']' => self.depth == 0 && !self.string,
            b'\n' => self.depth == 0 || self.string,
            b'{' => self.depth == 0,
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// Fed in pieces of so many bytes; `None` for what is no JSON.
    fn values(text: &str, piece: usize) -> Vec<Option<Value>> {
        let (mut values, mut found) = (Values::default(), Vec::new());
        for piece in text.as_bytes().chunks(piece) {
            values.feed(piece, |value| found.push(value.ok())).unwrap();
        }
        found
    }

    fn assert_values(text: &str, expected: &[Option<Value>]) {
        for piece in 1..=text.len() {
            assert_eq!(values(text, piece), expected, "{text:?} by {piece}");
        }
    }

    #[test]
    fn values_end_where_they_end_wherever_lines_do() {
        let two = [Some(json!({"a": 1})), Some(json!({"b": [2]}))];
        assert_values("{\"a\":1}{\"b\":[2]}", &two);
        assert_values("{\"a\"\n:\n1}\r\n\r\n{\"b\": [\n2]}", &two);
    }

    #[test]
    fn brackets_within_strings_are_no_brackets() {
        let one = [Some(json!({"a": "}\"{\\"})), Some(json!([]))];
        assert_values("{\"a\": \"}\\\"{\\\\\"} []", &one);
    }

    #[test]
    fn after_what_is_no_json_the_next_value_is_found() {
        let next = Some(json!({"a": 1}));
        for bad in ["help\n", "}", "{]", "{\"a: 1}\n", "{'a': 1}", "nonsense "] {
            assert_values(&format!("{bad}{{\"a\":1}}"), &[None, next.clone()]);
        }
        assert_values("7\n{\"a\":1}", &[Some(json!(7)), next]);
    }

    #[test]
    fn a_value_has_a_limit_and_so_has_its_depth() {
        let mut endless = Values::default();
        let piece = [b' '; 4096];
        endless.feed(b"{", |_| panic!("it has not ended")).unwrap();
        let fed = (0..=LIMIT / 4096).map(|_| endless.feed(&piece, |_| panic!("nor now")));
        assert_eq!(fed.last(), Some(Err(TooLong)));
        let deep = "[".repeat(100_000) + &"]".repeat(100_000);
        assert_eq!(values(&deep, 4096), [None]);
    }
}
