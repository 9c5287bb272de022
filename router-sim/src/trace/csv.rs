//! Lines of CSV: Azure's and `BurstGPT`'s. Neither has quoted commas.

use router_core::Micros;

use super::error::Problem;
use super::read::{Format, Raw, seconds};

/// Where in a line the fields stand.
#[derive(Debug)]
pub(super) struct Columns {
    format: Format,
    time: usize,
    input: usize,
    output: usize,
    session: Option<usize>,
    class: Option<usize>,
}

const AZURE: [&str; 3] = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"];
const BURST: [&str; 3] = ["Timestamp", "Request tokens", "Response tokens"];

impl Columns {
    /// From the names in the first line.
    pub(super) fn of(header: &str) -> Result<Self, Problem> {
        let names: Vec<&str> = header.split(',').map(bare).collect();
        let find = |wanted: &str| names.iter().position(|name| name.eq_ignore_ascii_case(wanted));
        let [format, wanted] = [(Format::Azure, AZURE), (Format::BurstGpt, BURST)];
        let knows = |wanted: &[&str]| wanted[1..].iter().any(|name| find(name).is_some());
        let (format, wanted) = match (knows(&AZURE), knows(&BURST)) {
            (true, _) => format,
            (_, true) => wanted,
            _ => return Err(Problem::Format),
        };
        let column = |name: &'static str| find(name).ok_or(Problem::Column(name));
        let [time, input, output] = wanted.map(column);
        let (session, class) = (find("Session ID"), find("Log Type"));
        Ok(Self { format, time: time?, input: input?, output: output?, session, class })
    }

    pub(super) const fn format(&self) -> Format {
        self.format
    }

    /// Names of the columns for time, input and output.
    const fn names(&self) -> [&'static str; 3] {
        if matches!(self.format, Format::Azure) { AZURE } else { BURST }
    }

    pub(super) const fn time(&self) -> &'static str {
        self.names()[0]
    }

    /// A request, or `None` where it failed.
    pub(super) fn row<'a>(&self, line: &'a str) -> Result<Option<Raw<'a>>, Problem> {
        let fields = Fields(line);
        let [time, input, output] = self.names();
        let at = fields.get(self.time).ok_or(Problem::Field(time))?;
        let at = if self.format == Format::Azure {
            let expected = "a date and a time, as 2023-11-16 18:15:46.68";
            instant(at).ok_or_else(|| Problem::Value { field: time, value: at.to_owned(), expected })?
        } else {
            seconds(time, number(time, at)?)?
        };
        let tokens = |field, at| -> Result<u64, Problem> {
            let text = fields.get(at).ok_or(Problem::Field(field))?;
            let expected = "tokens are whole numbers";
            text.parse().map_err(|_| Problem::Value { field, value: text.to_owned(), expected })
        };
        let raw = Raw {
            at,
            input: (input, tokens(input, self.input)?),
            output: (output, tokens(output, self.output)?),
            session: self.session.and_then(|at| fields.get(at)).filter(|id| !id.is_empty()),
            class: match self.format {
                Format::Azure => "azure",
                _ => self.class.and_then(|at| fields.get(at)).unwrap_or("burstgpt"),
            },
            ..Raw::default()
        };
        Ok(Some(raw).filter(|raw| self.format != Format::BurstGpt || raw.output.1 > 0))
    }
}

#[derive(Clone, Copy)]
struct Fields<'a>(&'a str);

impl<'a> Fields<'a> {
    fn get(self, at: usize) -> Option<&'a str> {
        self.0.split(',').nth(at).map(bare)
    }
}

fn bare(field: &str) -> &str {
    field.trim().trim_matches('"')
}

fn number(field: &'static str, text: &str) -> Result<f64, Problem> {
    let wrong = || Problem::Value { field, value: text.to_owned(), expected: "a time is a number of seconds" };
    text.parse().map_err(|_| wrong())
}

/// `YYYY-MM-DD hh:mm:ss[.fraction]`, with or without an offset, which is left out: all lines have the same.
fn instant(text: &str) -> Option<Micros> {
    let (date, time) = text.split_once([' ', 'T'])?;
    let time = time.split(['+', 'Z']).next()?;
    let mut date = date.splitn(3, '-').map(str::parse::<u64>);
    let mut next = || date.next()?.ok();
    let (year, month, day) = (next()?, next()?, next()?);
    let mut time = time.splitn(3, ':');
    let mut next = || time.next();
    let (hour, minute, second) = (next()?.parse::<u64>().ok()?, next()?.parse::<u64>().ok()?, next()?);
    let (second, fraction) = second.split_once('.').unwrap_or((second, ""));
    let second = second.parse::<u64>().ok()?;
    let sane = (1970..=9999).contains(&year)
        && (1..=12).contains(&month)
        && (1..=31).contains(&day)
        && hour < 24
        && minute < 60
        && second <= 60
        && fraction.bytes().all(|digit| digit.is_ascii_digit());
    if !sane {
        return None;
    }
    // to microseconds; what is finer is cut off
    let micros = fraction
        .bytes()
        .chain(std::iter::repeat(b'0'))
        .take(6)
        .fold(0, |sum, digit| sum * 10 + u64::from(digit - b'0'));
    // days of the Gregorian calendar, with years that begin in March, so that the leap day is the last
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days = year * 365 + year / 4 - year / 100 + year / 400 + (month * 153 + 2) / 5 + day - 1;
    let days = days - 719_468;
    Some(Micros((((days * 24 + hour) * 60 + minute) * 60 + second) * 1_000_000 + micros))
}

#[cfg(test)]
mod tests {
    use super::instant;
    use router_core::Micros;

    #[test]
    fn dates_are_counted() {
        let cases = [
            ("1970-01-01 00:00:00", 0),
            ("2000-02-29 12:00:00.5", 951_825_600_500_000),
            ("2000-03-01 00:00:00", 951_868_800_000_000),
            ("2023-11-16 18:15:46.6805900", 1_700_158_546_680_590),
            ("2024-05-10 00:00:00.009930+00:00", 1_715_299_200_009_930),
            ("2024-05-10T00:00:00Z", 1_715_299_200_000_000),
        ];
        for (text, micros) in cases {
            assert_eq!(instant(text), Some(Micros(micros)), "{text}");
        }
        for text in [
            "",
            "2024",
            "2024-05-10",
            "2024-13-10 00:00:00",
            "2024-05-10 24:00:00",
            "1969-01-01 00:00:00",
            "2024-05-10 00:00:00.x",
        ] {
            assert_eq!(instant(text), None, "{text}");
        }
    }
}
