//! Every source of a value against every other.

use proptest::prelude::*;

use super::*;
use crate::cli;
use clap::ArgAction;
use serde_json::Value;

/// A file that is gone after the test.
struct Written(PathBuf);

impl Written {
    fn new(name: &str, text: &str) -> Self {
        let path = std::env::temp_dir().join(format!("scls-config-{}-{name}", std::process::id()));
        std::fs::write(&path, text).expect("a temporary file");
        Self(path)
    }

    fn path(&self) -> &str {
        self.0.to_str().expect("UTF-8")
    }
}

impl Drop for Written {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn environment(pairs: &[(&str, &str)]) -> Environment {
    pairs.iter().map(|(name, value)| (name.into(), value.into())).collect()
}

fn read_line(line: &[&str], env: &[(&str, &str)]) -> Result<Parsed, Vec<String>> {
    let args = ["scls-router"].iter().chain(line).map(OsString::from);
    parse(args, &environment(env)).map_err(|wrong| match wrong {
        Wrong::Flags(error) => vec![error.to_string()],
        Wrong::Values(problems) => problems,
    })
}

fn setting<'a>(parsed: &'a Parsed, key: &str) -> (&'a str, Origin) {
    let setting = parsed.settings.iter().find(|setting| setting.key == key).expect(key);
    (setting.value.as_deref().unwrap_or("none"), setting.origin.clone())
}

fn problems(line: &[&str], env: &[(&str, &str)]) -> Vec<String> {
    read_line(line, env).err().expect("it is wrong")
}

#[test]
fn the_nearest_source_wins() {
    let written = [
        Written::new(
            "order.toml",
            "port = 3\nslice-len = 3\nlog_json = true\nworker_urls = ['grpc://f:1', 'grpc://g:2']",
        ),
        Written::new("order.yaml", "port: 3\nslice-len: 3\nlog_json: true\nworker_urls: [grpc://f:1, grpc://g:2]"),
    ];
    let flag = |flag: &str| Origin::Flag(flag.into());
    let env = |name: &str| Origin::Env(name.into());
    for file in &written {
        let from_file = |key: &str| Origin::File(file.0.clone(), key.into());
        let config = ["--config", file.path()];
        let port_env = ("SCLS_ROUTER_PORT", "2");
        let json_env = ("SCLS_ROUTER_LOG_JSON", "no");
        let both = "[\"grpc://f:1\", \"grpc://g:2\"]";
        let urls_env = ("SCLS_ROUTER_WORKER_URLS", "grpc://e:1");
        for (flags, vars, key, value, origin) in [
            (&["--port", "1"][..], &[port_env][..], "port", "1", flag("--port")),
            (&[], &[port_env], "port", "2", env("SCLS_ROUTER_PORT")),
            (&[], &[("SCLS_ROUTER_PORT", "")], "port", "3", from_file("port")),
            (&[], &[], "port", "3", from_file("port")),
            (&[], &[], "slice_len", "3", from_file("slice-len")),
            (&[], &[], "seed", "0", Origin::Default),
            (&["--log-json=false"], &[], "log_json", "false", flag("--log-json")),
            (&["--log-json"], &[json_env], "log_json", "true", flag("--log-json")),
            (&[], &[json_env], "log_json", "false", env("SCLS_ROUTER_LOG_JSON")),
            (&["--worker-urls", "grpc://a:1"], &[urls_env], "worker_urls", "[\"grpc://a:1\"]", flag("--worker-urls")),
            (&[], &[urls_env], "worker_urls", "[\"grpc://e:1\"]", env("SCLS_ROUTER_WORKER_URLS")),
            (&[], &[], "worker_urls", both, from_file("worker_urls")),
        ] {
            let line = [&["serve"], &config[..], flags].concat();
            let parsed = read_line(&line, vars).unwrap_or_else(|why| panic!("{line:?} {vars:?}: {why:?}"));
            assert_eq!(setting(&parsed, key), (value, origin), "{line:?} {vars:?}");
        }
        // The struct that serves has what is shown.
        let parsed = read_line(&[&["serve"], &config[..]].concat(), &[port_env]).expect("valid");
        let cli::Command::Serve { workers, serve } = parsed.cli.command else { panic!("not serve") };
        assert_eq!((serve.http.port, serve.log_json, workers.worker_urls.len()), (2, true, 2));
        // The file's place may come from the environment, and one file serves `up` and `health` too.
        let place = ("SCLS_ROUTER_CONFIG", file.path());
        let parsed = read_line(&["up", "--model", "m"], &[place]).expect("valid");
        assert_eq!(setting(&parsed, "port"), ("3", from_file("port")));
        let cli::Command::Health(health) = read_line(&["health"], &[place]).expect("valid").cli.command else {
            panic!("not health")
        };
        assert_eq!(health.http.port, 3);
    }
}

#[test]
fn an_error_says_where_the_value_came_from() {
    for (name, text, expected) in [
        ("a.toml", "port = 70000", "port: invalid value '70000': 70000 is not in 0..=65535"),
        ("b.toml", "port = -1", "port: invalid value '-1': -1 is not in 0..=65535"),
        ("c.toml", "port = [1]", "port: it is one value, not a list or a section"),
        ("d.yaml", "port:", "port: it has no value"),
        (
            "e.toml",
            "policy = 'best'",
            "policy: invalid value 'best': it is one of product, product_anticipating, product_time",
        ),
        ("f.toml", "slice_length = 1", "slice_length: unknown key\ndid you mean slice_len?"),
        ("g.toml", "xyz = 1", "xyz: unknown key\n`scls-router config show` lists all"),
        ("h.toml", "config = 'other.toml'", "config: unknown key"),
        ("i.toml", "[serve]\nport = 1", "serve: a configuration has no sections"),
        ("j.toml", "slice_len = 1\nslice-len = 2", "slice-len: it is set twice"),
        ("k.toml", "fleet_key = 'abc'", "fleet_key: a secret is not written into the file"),
        ("l.toml", "fleet_key = 'env:NO_SUCH'", "fleet_key: the environment variable is not set: NO_SUCH"),
        ("m.toml", "worker_urls = ['grpc://a']", "worker_urls: invalid value 'grpc://a': the port is missing"),
        ("n.toml", "model = ''", "model: invalid value '': it is empty"),
        ("o.toml", "port = ", "line 1, column 8: "),
        ("w.toml", "worker_urls = []", "worker_urls: it is empty"),
        ("p.yml", "port: [", "did not find"),
        ("q.yaml", "a", "invalid type"),
        ("r.yaml", "port: 1\nport: 2", "duplicate entry with key \"port\""),
        ("s.yaml", "port: !x 1", "port: it is one value"),
        ("t.yaml", "port: .nan", "port: it has no value"),
        ("u.yaml", "[1]: 2", "key must be a string"),
        ("v.json", "{}", "a configuration file ends in .toml, .yaml or .yml"),
    ] {
        let file = Written::new(name, text);
        // What a flag overrides is checked too: the file is wrong whatever the flags are.
        let found = problems(&["config", "check", "--config", file.path(), "--port", "1"], &[]);
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].starts_with(&format!("{}: {expected}", file.path())), "{text}: {found:?}");
    }
    let found = problems(&["config", "check", "--config", "/no/such.toml"], &[]);
    assert!(found[0].starts_with("/no/such.toml: cannot read it: "), "{found:?}");

    for (name, value, expected) in [
        ("SCLS_ROUTER_PORT", "x", "env SCLS_ROUTER_PORT: invalid value 'x': it is not an integer"),
        ("SCLS_ROUTER_WORKERS", "0", "env SCLS_ROUTER_WORKERS: invalid value '0': 0 is not in 1..=1024"),
        ("SCLS_ROUTER_FLEET_KEY", "file:/no/such", "env SCLS_ROUTER_FLEET_KEY: cannot read /no/such: "),
    ] {
        let found = problems(&["config", "check"], &[(name, value)]);
        assert!(found.len() == 1 && found[0].starts_with(expected), "{found:?}");
    }
    let service_link = problems(&["config", "check"], &[("SCLS_ROUTER_PORT", "tcp://10.0.0.1:80")]);
    assert!(service_link[0].contains("enableServiceLinks"), "{service_link:?}");
    // All at once.
    let file = Written::new("all.toml", "port = 'x'\nslice_len = 0");
    assert_eq!(problems(&["serve", "--config", file.path()], &[("SCLS_ROUTER_SEED", "x")]).len(), 3);
}

#[test]
fn a_text_means_the_same_wherever_it_comes_from() {
    let texts = [
        "0",
        "1",
        "-1",
        "16",
        "65536",
        "1.5",
        " 1",
        "1e3",
        "99999999999999999999",
        "true",
        "No",
        "on",
        "abc",
        "random",
        "info",
        "grpc://a:1",
        "http://a:1,grpc://b:2",
        "grpc://a",
        "--x y",
        "é\t\"\\",
        "[1]",
        "~",
        "# x",
        "'",
    ];
    let definition = definition_of_all();
    let mut valid = 0;
    for arg in settings(&definition).filter(|arg| !is_secret(arg)) {
        let (key, variable) = (arg.get_id().as_str(), arg.get_env().and_then(OsStr::to_str).expect("it has one"));
        for text in texts {
            let quoted = toml::Value::String(text.into()).to_string();
            let toml = Written::new("text.toml", &format!("{key} = {quoted}"));
            let yaml = Written::new("text.yaml", &format!("{key}: {}", Value::from(text)));
            let flag = format!("--{}={text}", key.replace('_', "-"));
            let found = [
                read_line(&["config", "show", &flag], &[]),
                read_line(&["config", "show"], &[(variable, text)]),
                read_line(&["config", "show", "--config", toml.path()], &[]),
                read_line(&["config", "show", "--config", yaml.path()], &[]),
            ];
            let found = found.map(|parsed| parsed.ok().map(|parsed| setting(&parsed, key).0.to_owned()));
            assert!(found.iter().all(|value| *value == found[0]), "{key} {text:?}: {found:?}");
            valid += usize::from(found[0].is_some());
        }
    }
    assert!(valid > 100, "{valid}");
}

proptest! {
    /// Every error is one for people, with the file's name: nothing panics, nothing is taken silently.
    #[test]
    fn whatever_a_file_holds_is_answered(text in "(port|seed|log_json|- |: |= |[\\[\\]{}&*!|>'\"%@`,#?\n\t \\\\]|[a-z0-9.-]|<<|\\PC){0,30}") {
        for name in ["any.toml", "any.yaml"] {
            let file = Written::new(name, &text);
            if let Err(problems) = read_line(&["config", "check", "--config", file.path()], &[]) {
                prop_assert!(!problems.is_empty());
                prop_assert!(problems.iter().all(|problem| problem.starts_with(file.path())), "{:?}", problems);
            }
        }
    }
}

#[test]
fn secrets_are_found_and_not_shown() {
    let secret = Written::new("secret", "from a file\n");
    let named = format!("file:{}", secret.path());
    let by_file = Written::new("secret.toml", &format!("fleet_key = '{named}'"));
    let by_env = Written::new("secret-env.toml", "fleet_key = 'env:THE_KEY'");
    let the_key = ("THE_KEY", "from a variable");
    for (flags, vars, expected) in [
        (&["--fleet-key", "itself"][..], &[][..], "itself"),
        (&["--fleet-key", &named], &[], "from a file"),
        (&["--fleet-key", "env:THE_KEY"], &[the_key], "from a variable"),
        (&[], &[("SCLS_ROUTER_FLEET_KEY", named.as_str())], "from a file"),
        (&["--config", by_file.path()], &[], "from a file"),
        (&["--config", by_env.path()], &[the_key], "from a variable"),
        (&[], &[], ""),
    ] {
        let line = [&["serve", "--worker-urls", "grpc://a:1"], flags].concat();
        let parsed = read_line(&line, vars).unwrap_or_else(|why| panic!("{line:?}: {why:?}"));
        let cli::Command::Serve { serve, .. } = &parsed.cli.command else { panic!("not serve") };
        assert_eq!(serve.pool_config().fleet_key, expected);
        let shown = show(&parsed.settings, true);
        let line = shown.lines().find(|line| line.contains("fleet_key")).expect("it is a setting");
        let stars = if expected.is_empty() { "# fleet_key is not set" } else { "# fleet_key = \"***\"  # " };
        assert!(line.starts_with(stars), "{line}");
        assert!(expected.is_empty() || !shown.contains(expected), "{shown}");
    }
}

#[test]
fn what_is_shown_sets_the_same() {
    let vars = [("SCLS_ROUTER_SEED", "18446744073709551615"), ("SCLS_ROUTER_WORKER_ARGS", "--x \"a\\b\"\u{7f}")];
    let line = ["config", "show", "--worker-urls", "grpc://a:1,grpc://b:2", "--model", "007", "--log-json"];
    let first = read_line(&line, &vars).expect("valid");
    let first = [show(&first.settings, false), show(&first.settings, true)];
    for text in &first {
        let file = Written::new("shown.toml", text);
        let again = read_line(&["config", "show", "--config", file.path()], &[]).expect("valid");
        assert_eq!(show(&again.settings, false), first[0]);
    }
}

#[test]
fn what_is_missing_is_named() {
    let check = |flags: &[&str]| {
        let parsed = read_line(&[&["config", "check"], flags].concat(), &[]).expect("valid");
        (missing("serve", &parsed.settings), missing("up", &parsed.settings))
    };
    assert_eq!(check(&[]), (vec!["worker_urls".to_owned()], vec!["model".to_owned()]));
    assert_eq!(check(&["--worker-urls", "grpc://a:1"]), (vec![], vec!["model".to_owned()]));
    let usage = problems(&["serve"], &[("SCLS_ROUTER_PORT", "1")]).concat();
    assert!(usage.contains("serve [OPTIONS] --worker-urls <WORKER_URLS>...\n"), "{usage}");
}

#[test]
fn unknown_variables_name_the_nearest() {
    let vars = [("SCLS_ROUTER_SLICE_LENGTH", "5"), ("SCLS_ROUTER_SEED", "1"), ("SCLS_WORKER_X", "1")];
    let warnings = read_line(&["config", "check"], &vars).expect("valid").warnings;
    let expected = "unknown environment variable SCLS_ROUTER_SLICE_LENGTH; the nearest that is read is \
                    SCLS_ROUTER_SLICE_LEN";
    assert_eq!(warnings, [expected]);
    assert!(read_line(&["version"], &vars).expect("valid").warnings.is_empty());
}

#[test]
fn a_slice_length_needs_the_papers_scheduler_wherever_it_comes_from() {
    let check = |flags: &[&str], vars: &[(&str, &str)]| {
        let parsed = read_line(&[&["config", "check"], flags].concat(), vars).expect("each value is valid");
        let cli::Command::Config(cli::ConfigCommand::Check { all }) = &parsed.cli.command else { panic!("not check") };
        let core = all.serve.pool_config().scheduler;
        all.serve.check(&parsed.settings).map(|()| (core.mode.as_str(), core.slice_len))
    };
    let file = Written::new("slice.toml", "slice_len = 8\nscheduler = 'ils'");
    let config = ["--config", file.path()];
    let variable = ("SCLS_ROUTER_SLICE_LEN", "8");
    let scls = ("SCLS_ROUTER_SCHEDULER", "scls");
    for (flags, vars, sls) in [
        (&["--slice-len", "8", "--scheduler", "scls"][..], &[][..], false),
        (&["--slice-len", "8"], &[scls], false),
        (&["--scheduler", "scls"], &[variable], false),
        (&config, &[scls], false),
        (&["--scheduler", "sls"], &[], true),
    ] {
        let expected = if sls { ("sls", None) } else { ("scls", Some(8)) };
        assert_eq!(check(flags, vars), Ok(expected), "{flags:?} {vars:?}");
    }
    assert_eq!(check(&[], &[]), Ok(("slice", None)));
    assert_eq!(check(&[], &[scls]), Ok(("scls", None)));
    let of_file = format!("slice_len ({0}: slice_len) does not go with scheduler ils ({0}: scheduler)", file.path());
    for (flags, vars, expected) in [
        (&["--slice-len", "8"][..], &[][..], "slice_len (flag --slice-len) does not go with scheduler slice (default)"),
        (&[], &[variable], "slice_len (env SCLS_ROUTER_SLICE_LEN) does not go with scheduler slice (default)"),
        (
            &["--scheduler", "sls"],
            &[variable],
            "slice_len (env SCLS_ROUTER_SLICE_LEN) does not go with scheduler sls (flag --scheduler)",
        ),
        (&config, &[], &of_file),
    ] {
        let found = check(flags, vars).expect_err("it is wrong");
        assert!(found.starts_with(expected), "{flags:?} {vars:?}: {found}");
    }
    for wrong in ["so", "pm", "ab", "lb", "slices"] {
        let found = problems(&["config", "check"], &[("SCLS_ROUTER_SCHEDULER", wrong), variable]);
        assert!(found[0].contains("it is one of slice, scls, sls, ils"), "{wrong}: {found:?}");
    }
}

/// The rules of `cli.rs`, without which a setting could not come from a file.
#[test]
fn every_setting_has_a_variable_and_takes_a_value() {
    let definition = definition_of_all();
    for arg in settings(&definition) {
        let id = arg.get_id().as_str();
        assert_eq!(arg.get_long(), Some(id.replace('_', "-").as_str()));
        assert_eq!(arg.get_env(), Some(OsStr::new(&format!("SCLS_ROUTER_{}", id.to_uppercase()))));
        assert!(matches!(arg.get_action(), ArgAction::Set | ArgAction::Append), "{id} takes no value");
        assert!(arg.get_help_heading().is_some(), "{id} is in no group of the help");
    }
}
