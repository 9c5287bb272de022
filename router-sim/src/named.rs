//! The name that was meant.

/// A hint for an unknown name: the one most like it, or all where none is.
pub(crate) fn hint(name: &str, known: &[&str]) -> String {
    const ALIKE: f64 = 0.7;
    let alike = known.iter().map(|one| (*one, strsim::jaro_winkler(&name.to_lowercase(), one)));
    match alike.max_by(|one, other| one.1.total_cmp(&other.1)) {
        Some((one, likeness)) if likeness >= ALIKE => format!("did you mean {one}?"),
        _ => format!("known are: {}", known.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::hint;

    #[test]
    fn the_nearest_or_all() {
        let known = ["7b-h20", "13b-a100"];
        assert_eq!(hint("13B_A100", &known), "did you mean 13b-a100?");
        assert_eq!(hint("xyzzy", &known), "known are: 7b-h20, 13b-a100");
        assert_eq!(hint("", &[]), "known are: ");
    }
}
