"All package metadata lives in settings.ini; setuptools reads it through here."
from configparser import ConfigParser
from setuptools import find_packages, setup

ini = ConfigParser(delimiters=['='])
ini.read('settings.ini', encoding='utf-8')
c = ini['DEFAULT']
n = c['lib_name']
extras = {k: c[f'{k}_requirements'].split() for k in ('export', 'eval', 'dev')}
extras['dev'] += extras['export']
setup(name=n, version=c['version'], description=c['description'], author=c['author'], author_email=c['author_email'], license=c['license'],
    python_requires=f">={c['min_python']}", install_requires=c['requirements'].split(), extras_require=extras, packages=find_packages(include=[n]),
    package_data={n: ['data/*']}, entry_points=dict(console_scripts=[c['console_scripts']], nbdev=[f'{n}={n}._modidx:d']))
